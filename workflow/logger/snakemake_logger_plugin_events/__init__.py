"""Snakemake's events as lines of JSON on the file descriptor JEPA_NB_EVENTS, which `jepa_nb reproduce` reads.

`snakemake-logger-plugin-rich` 0.5.1 is no alternative: it draws one bar per rule in a panel, does not show the time
left, prints nothing without a terminal, and prints whole logs of failed jobs. Snakemake finds a plugin by its name on
PYTHONPATH, so this one needs no installation."""
import json
import os

from snakemake_interface_logger_plugins.base import LogHandlerBase

FIELDS = ('jobid', 'job_id', 'rule_name', 'rule_msg', 'wildcards', 'log', 'benchmark', 'threads', 'reason')
EVENTS = ('job_info', 'job_finished', 'job_error')


class LogHandler(LogHandlerBase):
    writes_to_stream = writes_to_file = needs_rulegraph = False # Snakemake's own log goes on beside it
    has_filter = has_formatter = True # nothing is hidden by --quiet

    def __post_init__(self):
        self.fd = int(os.environ['JEPA_NB_EVENTS'])

    def emit(self, record):
        event = str(getattr(record, 'event', None) or '')
        if event not in EVENTS: return
        fields = {k: v for k in FIELDS if (v := getattr(record, k, None)) is not None}
        try: os.write(self.fd, (json.dumps(dict(event=event) | fields, default=str)+'\n').encode())
        except OSError: pass # the reader has ended; this process ends with it
