"""The site: `make docs`. Its pages are Markdown files of the repository; generate.py wrote two of
them."""

project = "aquabit"
author = copyright = "The aquabit authors"
extensions = ["myst_parser"]
# The repository is the source, so that links from the documentation to measurements lead to pages too.
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "benchmarks/results/*.md",
    "zoo/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
exclude_patterns = [".*", "build", "aquabit", "tests", "demo"]
myst_heading_anchors = 3  # links to headings, as on GitHub
html_theme = "furo"
html_title = "aquabit"
html_show_sphinx = False
