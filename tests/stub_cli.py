"""Stands in for `jepa_nb.cli` in test_graph.py: writes what a job would write, in no time.

A run goes on from where it was killed, like a real one, and writes the number of its process into the run folder at
every step."""
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import yaml

from jepa_nb.launch import join_job_lock

FOUND = dict(acc_chosen=.5, knn_chosen=.4, acc_late=.5, knn_late=.4, rmse_oracle=1., constant=dict(rmse_oracle=1.),
             n_test=4, data='x')
join_job_lock()
verb, *words = sys.argv[1:]
given = dict(zip(words, words[1:]))
if verb == 'data':
    out, split, images = Path(words[1]), given['--split'], int(given['--images'])
    out.mkdir(parents=True, exist_ok=True)
    for k in range(-(-images//1000)): (out/f'{split}-{k:06d}.tar').write_text(' '.join(words))
elif (fails := os.environ.get('STUB_FAILS')) and fails in ' '.join([verb, *words]):
    sys.exit('\n'.join(f'line {k}' for k in range(20)))
elif verb == 'train':
    out, steps = Path(given['--out']), int(os.environ.get('STUB_STEPS', 1))
    start = given.get('--from')
    if start and not (Path(start).parents[1]/'done.json').exists(): sys.exit(f'{start}: not there yet')
    out.mkdir(parents=True, exist_ok=True)
    done = len((out/'steps').read_text().split()) if (out/'steps').exists() else 0
    for _ in range(done, steps):
        with open(out/'steps', 'a') as f: f.write(f'{os.getpid()}\n')
        time.sleep(.1)
    (out/'done.json').write_text('{}')
elif verb == 'eval':
    Path(given['--out']).parent.mkdir(parents=True, exist_ok=True)
    if '--sets' in given: names = list(yaml.safe_load(given['--sets']))
    else: names = [b.replace(',', '-') for a, b in zip(words, words[1:]) if a == '--condition'] or ['probe']
    for name in names:
        path = Path(given['--out'].replace('{set}', name).replace('{condition}', name))
        path.write_text(json.dumps(FOUND | dict(words=' '.join(words))))
elif verb in ('depth', 'ranks', 'measure'):
    out = Path(given['--out'])
    out.parent.mkdir(parents=True, exist_ok=True)
    for s in ('.json', '.safetensors') if verb == 'depth' else ('.json',):
        out.with_suffix(s).write_text(json.dumps(FOUND | dict(words=' '.join(words))))
    if verb == 'depth':
        import numpy as np
        np.savez(out.with_suffix('.npz'), index=np.arange(4), rmse_oracle=np.ones(4), constant_rmse_oracle=np.ones(4))
elif verb == 'report':
    Path('report').mkdir(exist_ok=True)
    with open('report/index.html', 'a') as f: f.write('built\n')
elif verb == 'figure':
    out = given['--out']
    for s in ('.png', '.csv'): Path(out+s).write_text(json.dumps(words))
    sums = {k: hashlib.sha256(Path(f'{out}.{k}').read_bytes()).hexdigest() for k in ('csv', 'png')}
    Path(out+'.json').write_text(json.dumps(dict(words=words, sha256=sums)))
else: sys.exit(f'{verb}: the stub does not know it')
