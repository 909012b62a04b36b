"Reads settings.ini, so that requirements stand once."
import shlex
from configparser import ConfigParser

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini')
cfg = ini['DEFAULT']
lib = cfg['lib_name']
setup(
    name=lib, version=cfg['version'], description=cfg['description'], author=cfg['author'], keywords=cfg['keywords'],
    packages=find_packages(include=[lib, lib+'.*']), python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg['requirements']),
    extras_require={k: shlex.split(cfg[k+'_requirements']) for k in ('fast', 'workbook', 'dev', 'interop')},
    entry_points={'console_scripts': [f'{lib} = {lib}.cli:main'], 'nbdev': [f'{lib} = {lib}._modidx:d']},
)
