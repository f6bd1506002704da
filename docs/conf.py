"""Builds the site: `sphinx-build -W -b html docs docs/_build/html`. Every chapter of the guide is run on the way."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ["PYTHONPATH"] = str(ROOT)  # of the chapters, which run in processes of their own

project = "Wafer-map defects"
author = "the authors"
html_title = project

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "generated_pages"]
exclude_patterns = ["_*", "*.py", "**.ipynb_checkpoints"]
templates_path = ["_templates"]

# A chapter is a script with the text in comments. It runs in a folder of its own, and an error stops the build.
nb_custom_formats = {".py": "generated_pages.read_chapter"}
nb_execution_mode = "force"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_execution_show_tb = True
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_mock_imports = ["ray", "psycopg"]
napoleon_google_docstring = True
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"  # for phones too, dark and light
html_show_sphinx = False
html_domain_indices = False
html_copy_source = False
