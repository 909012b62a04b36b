"""Streams: what is read again when a run goes on, connections that break, shards that are lost, and bounds."""
import http.server
import json
import os
import tarfile
import threading
import time
import warnings
from itertools import islice

import pytest
import torch
from test_first_aid import END, entry, good, jpeg
from test_resume import tiny

import jepa_nb.streams
from jepa_nb.checkpoint import read_log
from jepa_nb.images import DataError
from jepa_nb.loader import loader
from jepa_nb.shards import write_shards
from jepa_nb.sources import open_source
from jepa_nb.streams import Stream, StreamReader, open_stream, read_shard
from jepa_nb.train import train


class Site:
    "Files behind http: `files` by name, what was asked for, and how a name misbehaves."
    def __init__(self):
        self.files, self.asked, self.odd = {}, [], {} # odd: name -> function (request handler, bytes, start)
        self.has_ranges = True
        site = self
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *a): pass
            def do_GET(self):
                name, wanted = self.path.rsplit('/', 1)[-1], self.headers.get('Range', '')
                site.asked.append((name, wanted))
                start = int(wanted[6:-1]) if wanted and site.has_ranges else 0
                data = site.files.get(name)
                if name in site.odd and site.odd[name](self, data, start): return
                if data is None: return self.send_error(404)
                self.begin(data, start)
                self.wfile.write(data[start:])
            def begin(self, data, start):
                self.send_response(206 if start else 200)
                if start: self.send_header('Content-Range', f'bytes {start}-{len(data)-1}/{len(data)}')
                self.send_header('Content-Length', str(len(data)-start))
                self.end_headers()
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def breaks(self, name, after, times=1):
        "The connection for a name ends after so many bytes, so many times."
        left = [times]
        def odd(handler, data, start):
            if not left[0]: return False
            left[0] -= 1
            handler.begin(data, start)
            handler.wfile.write(data[start:start+after])
            handler.connection.close()
            return True
        self.odd[name] = odd

    def names(self): return [name for name, _ in self.asked]


@pytest.fixture
def site():
    s = Site()
    yield s
    s.server.shutdown()
    s.server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    class Time:
        monotonic, slept = staticmethod(time.monotonic), []
        @classmethod
        def sleep(cls, seconds): cls.slept.append(seconds)
    monkeypatch.setattr(jepa_nb.streams, 'time', Time)
    return Time.slept


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    "Eight shards of 20 scenes."
    folder, scenes = tmp_path_factory.mktemp('shards'), open_source('scenes', images=160, side=40)
    return write_shards((scenes.sample(i) for i in range(160)), folder/'t-%d.tar', per_shard=20)


@pytest.fixture
def stream(site, shards):
    for p in shards: site.files[p.name] = p.read_bytes()
    return Stream(f'{site.url}/t-{{0..7}}.tar', shuffle=3)


SETTINGS = ('pack.pool=4', 'pack.rows=3')


def same(a, b):
    tensors = lambda x: (*x.pack.image, *x.pack[1:], x.dataset_index)
    return all(map(torch.equal, tensors(a), tensors(b))) and a.images == b.images


# ---- going on

@pytest.mark.parametrize('workers', [0, 2])
def test_going_on_reads_the_shards_of_waiting_images_only(site, stream, workers):
    "Each at most once: of a worker the one that it is in, and the one before where images of it still wait."
    cfg, n = tiny(*SETTINGS), max(workers, 1)
    whole = list(islice(loader(stream, cfg, workers=workers), 14*n))
    for at in (3*n, 10*n):
        state = json.loads(json.dumps(whole[at].state))
        site.asked.clear()
        going = loader(stream, cfg, workers=0 if not workers else workers, state=state)
        rest = [next(going)]
        reread = site.names()
        rest += islice(going, 2)
        assert all(same(a, b) for a, b in zip(whole[at+1:], rest, strict=False))
        assert [b.state for b in rest] == [b.state for b in whole[at+1:at+4]]
        if not workers: # with workers others read ahead meanwhile
            turns = state['at'][0]['reader']['turn']
            assert turns > (0 if at < 5 else 3) and len(reread) == len(set(reread)) <= 2+1
    assert len(json.dumps(whole[-1].state)) < 3000*n


def test_a_reader_goes_on_from_anywhere(stream, shards):
    "With and without replacement, at the end of a pass, and with images of one shard that was drawn twice."
    for kw in (dict(shuffle=7), dict(shuffle=0), dict(shuffle=60), dict(replace=False, epochs=1, shuffle=50)):
        stream = Stream([str(p) for p in shards[:3]], seed=5, **kw)
        key = lambda images, n: [i.key for i in islice(images, n)]
        reader = StreamReader(stream)
        going = iter(reader)
        for n in (1, 19, 20, 9, 4):
            key(going, n)
            state = json.loads(json.dumps(reader.state()))
            again = iter(StreamReader(stream, state=state))
            follows = key(iter(StreamReader(stream, state=state)), 40)
            assert key(again, 40) == follows
        assert follows == key(going, 40)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_state_without_positions_is_read_from_the_beginning(stream, workers):
    "As the checkpoints of earlier versions are; one line says so."
    cfg = tiny(*SETTINGS)
    whole = list(islice(loader(stream, cfg, workers=workers), 8))
    state = json.loads(json.dumps(whole[3].state))
    for at in state['at']: at.pop('reader')
    with pytest.warns(UserWarning, match='all that was read is read again'):
        rest = list(islice(loader(stream, cfg, workers=workers, state=state), 4))
    assert all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_a_shard_that_fails_and_answers_later_is_no_secret(site, stream):
    "It is not read where it had failed: the run goes on as it would have, and says when the shard comes again."
    lost = site.files.pop('t-2.tar')
    cfg = tiny(*SETTINGS)
    whole = list(islice(loader(stream, cfg), 24))
    at = next(k for k, b in enumerate(whole) if any('t-2.tar: HTTP Error 404' in s for s in b.skipped))
    state = json.loads(json.dumps(whole[at+1].state))
    assert '404' in state['at'][0]['reader']['lost']['2']
    rest = list(islice(loader(stream, cfg, state=state), 3)) # while it is away still
    assert all(same(a, b) for a, b in zip(whole[at+2:], rest))
    site.files['t-2.tar'] = lost
    site.asked.clear()
    with pytest.warns(UserWarning, match='t-2.tar: can be read whole again; earlier it could not .HTTP Error 404'):
        rest = list(islice(loader(stream, cfg, state=state), 60))
    before = site.names().index('t-2.tar')
    assert before > 0 and same(whole[at+2], rest[0])


def test_waiting_images_that_are_gone_are_counted(site, stream):
    cfg = tiny(*SETTINGS)
    batches = list(islice(loader(stream, cfg), 6))
    state = batches[-1].state
    site.files.clear()
    with pytest.raises(DataError, match='nothing readable in .* lastly .*404'):
        list(islice(loader(stream, cfg, state=state), 50))
    site.files = {f't-{k}.tar': good(9)+END for k in range(8)} # other images under the same names
    skipped = [s for b in islice(loader(stream, cfg, state=state), 3) for s in b.skipped]
    waiting = state['at'][0]['reader']
    assert len(skipped) == len({*waiting['buffer'].split(), *waiting['held'].split()}-{'-'}) > 0
    assert 'waited in a buffer and cannot be read again as it was' in skipped[0]


# ---- connections

@pytest.mark.parametrize('ranges', [True, False])
@pytest.mark.parametrize('times', [1, 3])
def test_a_broken_connection_goes_on_where_it_broke(site, stream, shards, ranges, times):
    site.has_ranges = ranges
    site.breaks('t-1.tar', 5000, times)
    told = []
    got = [(i.key, i.data) for i in read_shard(f'{site.url}/t-1.tar', lambda *a: told.append(a))]
    assert got == [(i.key, i.data) for i in read_shard(str(shards[1]), None)] and len(got) == 20 and not told
    assert len(site.asked) == times+1 and site.asked[1][1] == 'bytes=5000-'


def test_a_connection_that_always_breaks_is_given_up(site, stream, no_pauses):
    site.breaks('t-1.tar', 3000, 10**6)
    told, size = [], len(site.files['t-1.tar'])
    got = list(read_shard(f'{site.url}/t-1.tar', lambda *a: told.append(a)))
    assert len(got) < 20 and told[-1] == ('t-1.tar', f'the connection ended at byte 12000 of {size}')
    assert len(site.asked) == 4 and len(no_pauses) >= 3 and sum(no_pauses) < 60


def test_a_file_that_changes_while_it_is_read(site, stream):
    site.breaks('t-1.tar', 5000)
    told, odd = [], site.odd['t-1.tar']
    def changed(handler, data, start):
        if odd(handler, data, start): return True
        site.files['t-1.tar'] = data+bytes(512)
        handler.begin(site.files['t-1.tar'], start)
        handler.wfile.write(site.files['t-1.tar'][start:])
        return True
    site.odd['t-1.tar'] = changed
    list(read_shard(f'{site.url}/t-1.tar', lambda *a: told.append(a)))
    assert told[-1] == ('t-1.tar', 'the file changed while it was read')


def test_a_busy_server_is_asked_again(site, stream, no_pauses):
    busy = [503, 429]
    def odd(handler, data, start):
        if not busy: return False
        handler.send_response(busy.pop())
        handler.send_header('Retry-After', '7')
        handler.end_headers()
        return True
    site.odd['t-0.tar'] = odd
    no_pauses.clear()
    with open_stream(f'{site.url}/t-0.tar') as f: assert f.read() == site.files['t-0.tar']
    assert no_pauses == [7, 7]


@pytest.mark.parametrize('to', ['file:///etc/hostname', 'ftp://127.0.0.1/x.tar', 'pipe:touch x', 'data:,x'])
def test_a_redirection_leads_to_no_other_scheme(site, to, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def odd(handler, data, start):
        handler.send_response(302)
        handler.send_header('Location', to)
        handler.end_headers()
        return True
    site.odd['t.tar'] = odd
    told = []
    assert list(read_shard(f'{site.url}/t.tar', lambda *a: told.append(a))) == [] and len(told) == 1
    assert not list(tmp_path.iterdir())


def test_an_archive_without_end_is_left(tmp_path, monkeypatch):
    "Folders, links and other files for ever, without an image."
    monkeypatch.setattr(jepa_nb.streams, 'MAX_GAP', 50_000)
    members = (entry('d', kind=tarfile.DIRTYPE), entry('l', kind=tarfile.SYMTYPE), entry('a.txt', b'x'),
               entry('a.jpg', b'x'))
    for k, member in enumerate(members):
        (tmp_path/f'{k}.tar').write_bytes(good(2)+member*400+good(2, 5)+END)
        told = []
        got = [i.key for i in read_shard(str(tmp_path/f'{k}.tar'), lambda *a: told.append(a))]
        assert got[:2] == ['g0', 'g1'] and 'g5' not in got and 'no image in 50000 bytes' in told[-1][1]
    (tmp_path/'long.tar').write_bytes(good(400)+END) # much longer, with images: read to its end
    assert len(list(read_shard(str(tmp_path/'long.tar'), None))) == 400 and os.path.getsize(tmp_path/'long.tar') > 5e5


def test_labels_that_training_does_not_read(tmp_path):
    "Words, floats and damaged JSON as labels: the images are read all the same."
    odd = b''.join(entry(f'a{k}.jpg', jpeg(k))+entry(f'a{k}.{ending}', text) for k, (ending, text) in enumerate((
        ('cls', b'cat'), ('cls', b'1.5'), ('json', b'{"label": "x"}'), ('json', b'{'), ('cls', b'7'))))
    (tmp_path/'a.tar').write_bytes(odd+END)
    told = []
    got = list(read_shard(str(tmp_path/'a.tar'), lambda *a: told.append(a)))
    assert [i.label for i in got] == [-1]*4+[7] and not told


def test_patterns_and_addresses(site):
    site.files['a b ü.tar'] = site.files['a%20b%20%C3%BC.tar'] = good(2)+END
    assert [i.key for i in read_shard(f'{site.url}/a b ü.tar', None)] == ['g0', 'g1']
    with pytest.raises(DataError, match='a brace is not closed'): Stream('http://host/{0..3.tar')
    for path in ('http://host/{0..99999999999}.tar', 'x/{0..9999}-{0..9999}.tar', 'x/{1..'+'9'*100+'}.tar'):
        with pytest.raises(DataError, match='names more than 1000000 shards'): Stream(path)
    told = []
    for url in ('http://', 'http://[::1/x.tar', 'http://host:port/x.tar', 'http://a\nb/x.tar'):
        assert list(read_shard(url, lambda *a: told.append(a))) == []
    assert len(told) == 4


# ---- a run

def test_lost_shards_are_counted_in_the_log(site, stream, tmp_path, capsys):
    "Once, with their reasons, and no more when the run goes on."
    del site.files['t-3.tar']
    site.files['t-5.tar'] = site.files['t-5.tar'][:20000]
    words = ('data.kind=shards', f'data.path={site.url}/t-{{0..7}}.tar', 'data.shuffle=3', 'data.replace=false',
             *SETTINGS, 'run.log_every=1', 'run.save_every=4')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        whole = train(tiny(*words, 'run.steps=10'), tmp_path/'whole', progress=False)
        err = capsys.readouterr().err
        part = train(tiny(*words, 'run.steps=4'), tmp_path/'part', progress=False)
        part = train(tiny(*words, 'run.steps=10'), part, progress=False)
    assert 'skipped: t-3.tar: HTTP Error 404' in err and 'skipped: t-5.tar: ' in err
    a, b = read_log(whole), read_log(part)
    assert a['skipped'] == b['skipped'] and a['loss'] == b['loss'] and a['skipped'][-1] >= 2
    one, two = (json.loads((r/'done.json').read_text())['sha256'] for r in (whole, part))
    assert one == two
