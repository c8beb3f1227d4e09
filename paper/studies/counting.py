"""Count layers and heads as the paper does, from 1: "the 7th head of the 27th layer".

Specs, records, ranks and plans count from 0. Only pictures, captions and messages convert, and all of them here.
Dimensions count from 0 everywhere, in the paper too.
"""

from __future__ import annotations


def counted(index: int) -> int:
    """Return the paper's number of the layer or head with this index."""
    return index + 1


def ordinal(index: int) -> str:
    """Return that number in words: "27th" for index 26."""
    number = counted(index)
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else endings.get(number % 10, 'th')}"


def place(params: dict) -> str:
    """Name the block that a study's params locate."""
    layer, head = ordinal(params["layer"]), params.get("head")
    if head is not None:
        return f"{ordinal(head)} head of the {layer} layer"
    return f"{'FFN' if params['site'] == 'ffn' else params['site']} output of the {layer} layer"
