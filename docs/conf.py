"""The book of the project: `make site` makes it of the notebooks' kept outputs and these pages; it runs nothing."""

project = "bandmask"
author = "the bandmask developers"
extensions = ["myst_nb"]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*.ipynb"]
exclude_patterns = ["**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = "bandmask"
html_static_path: list[str] = []
html_extra_path = ["front"]  # index.html, which leads to docs/index.html
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False

nb_execution_mode = "off"  # what a reader sees was run by `make notebooks`, and is kept
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # a widget's state isn't kept; its script would come from another host
nb_render_markdown_format = "myst"
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]
mathjax_path = "none"  # no page holds mathematics
