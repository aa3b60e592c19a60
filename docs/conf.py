"""The documentation site: all Markdown, the notebook, and the reference from the docstrings.

The root of the sources is the repository, so that a link is the same on the site and in a checkout:

    pip install '.[docs]' && sphinx-build -W --keep-going -c docs . build/site

(`python -m sphinx` would import the source folder, which has no extension.)
"""

import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "_site"))

import fill_in

import paged_optax

project = "paged_optax"
author = copyright = "The paged_optax authors"
version = release = paged_optax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
extensions += ["sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "examples/*.ipynb",
    "xla_ffi/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = ["**/.*", "build", "**/site-packages"]

# Markdown
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # a page may begin with a smaller heading

# The notebook has no outputs in the repository. It runs when the site is built, and an error in it
# fails the build.
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

# Docstrings: Google style; `name` is a link where there is something of that name.
smartquotes_action = "D"  # dashes; quotes in the texts of errors stay as they are
default_role = "py:obj"
autodoc_typehints = "none"  # signatures have them, as they are written
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Errors"]
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"paged_optax {release}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_site/static"]
html_css_files = ["site.css"]
html_extra_path = ["_site/root"]  # an index.html that leads to docs/
pygments_style, pygments_dark_style = "friendly", "native"
copybutton_exclude = ".linenos, .gp, .go"


def say_as_it_is(app, what, name, obj, options, lines):
    """Errors that are told in a sentence, not by their classes, are no list of classes."""
    text = "\n".join(lines)
    lines[:] = re.sub(r"^( *)Raises:\n(?= +As )", r"\1Errors:\n", text, flags=re.M).split("\n")


def skip_fields(app, what, name, obj, skip, options):
    """A field of a NamedTuple has no docstring of its own."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("source-read", fill_in.fill_in)
    app.connect("autodoc-process-docstring", say_as_it_is, priority=100)  # before Napoleon
    app.connect("autodoc-skip-member", skip_fields)
