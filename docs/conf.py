"""Builds the documentation as a website: `sphinx-build -c docs . build/site`.

The source directory is the repository, so that links between pages also work where the repository
is browsed. Links to other files become downloads.
"""

import mim_jax

project, author, release = "mim_jax", "The mim_jax authors", mim_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
default_role = "code"  # `name` in docstrings
include_patterns = ["*.md", "docs/*.md"]
templates_path = ["templates"]
html_additional_pages = {"index": "to_first_page.html"}
html_theme = "furo"
html_show_copyright = False
html_title = f"mim_jax {release}"
myst_heading_anchors = 4  # levels of headings that links can point to
autodoc_typehints = "none"  # the signature shows them
autodoc_member_order = "bysource"
linkcheck_timeout = 30
