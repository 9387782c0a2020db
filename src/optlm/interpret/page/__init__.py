"""One self-contained HTML file that shows the inside of a model on one text.

    page = inspect_page(open_subject(), "The cat sat on the mat.")
    page.write("inside.html")

The file opens without a network under a content policy that allows its own script and style and
nothing else. `assemble.py` puts it together, `attention.py` makes 144 maps of 2,048 x 2,048 small
enough to travel, `page.js` draws.
"""

from __future__ import annotations

from optlm.interpret.page.assemble import InspectPage, inspect_page

__all__ = ["InspectPage", "inspect_page"]
