"""Sphinx settings of the report; jepa_nb.site copies this file into its source folder. Nothing here uses a network."""
from docutils import nodes
from latex2mathml.converter import convert

from jepa_nb.site import api_lines, is_api_noise

project, author, html_title = 'jepa_nb', 'The jepa_nb developers', 'jepa_nb report'
extensions = ['myst_nb', 'sphinx.ext.autodoc']
exclude_patterns = ['figures/*/checkpoints/**', 'extra']
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type', 'misc.highlighting_failure']
nb_execution_mode, nb_merge_streams = 'off', True
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 3
default_role, toc_object_entries = 'literal', False
autodoc_member_order, autodoc_typehints = 'bysource', 'signature'
autodoc_preserve_defaults, autodoc_inherit_docstrings = True, False
autodoc_default_options = {'members': True, 'undoc-members': True, 'show-inheritance': False}
autodoc_class_signature, maximum_signature_line_length = 'mixed', 90
html_theme, html_static_path, html_extra_path = 'furo', ['static'], ['extra']
html_css_files, html_js_files = ['report.css'], ['report.js']
html_copy_source = html_show_sphinx = html_show_copyright = False
html_show_search_summary = False # summaries are fetched page by page, which a browser refuses on file://
html_math_renderer = 'mathml'
html_theme_options = dict(navigation_with_keys=False, top_of_page_buttons=[])


def visit(is_block):
    "LaTeX to MathML when the page is written, so that no script is needed to read it."
    def write(self, node):
        math = convert(node.astext(), display='block' if is_block else 'inline')
        self.body.append(f'<div class="math">{math}</div>' if is_block else math)
        raise nodes.SkipNode
    return write


def add_arguments(app, what, name, obj, options, lines): lines[:] = api_lines(obj, lines, what)


def skip_member(app, what, name, obj, skip, options): return True if is_api_noise(name, obj) else None


def setup(app):
    app.add_html_math_renderer('mathml', (visit(False), None), (visit(True), None))
    app.connect('autodoc-process-docstring', add_arguments)
    app.connect('autodoc-skip-member', skip_member)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
