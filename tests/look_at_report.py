"""Pictures of the report's pages as a browser shows them, wide and on a phone.

python tests/look_at_report.py FOLDER [REPORT]

FOLDER gets PNGs of the first screens at 1280 and 390 px; REPORT: report/ by default"""
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

SIZES = {1280: 800, 390: 844} # width: height, of a laptop and of a phone
PAGES = ('index', 'claims', 'results/index', 'results/fn_table1', 'results/fn_energy', 'nbs/index', 'nbs/20_norms',
         'nbs/figures/fn_table1', 'api/masks', 'cli', 'use')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']


def browser_path():
    return next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)


@contextmanager
def browser():
    "A headless Chromium of the system; nothing is downloaded."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=browser_path(), headless=True, args=FLAGS)
        try: yield b
        finally: b.close()


def main(folder, report='report'):
    folder, report = Path(folder), Path(report).resolve()
    if browser_path() is None: sys.exit('look_at_report: no chromium here; on Debian: apt-get install chromium')
    folder.mkdir(parents=True, exist_ok=True)
    with browser() as b:
        for width, height in SIZES.items():
            page = b.new_page(viewport=dict(width=width, height=height))
            for name in PAGES:
                if not (report/f'{name}.html').is_file(): continue
                page.goto(f'file://{report}/{name}.html')
                page.screenshot(path=folder/f"{name.replace('/', '-')}-{width}.png", full_page=name == 'index')
                if name != 'claims': continue
                for d in page.query_selector_all('details.claim')[4:5]:
                    d.evaluate('d => { d.open = true; d.scrollIntoView() }')
                page.wait_for_timeout(800) # the theme scrolls smoothly
                page.screenshot(path=folder/f'claims-open-{width}.png')
            page.close()


if __name__ == '__main__': main(*sys.argv[1:3])
