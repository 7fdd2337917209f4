"""SVG files of matplotlib: points with titles, and as elements of a page, linked to its layers."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping

from markupsafe import Markup

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# SVG id -> kind ("layer" or "tip") and the names of its points, in order
Named = Mapping[str, tuple[str, list[str]]]

ET.register_namespace("", SVG)
ET.register_namespace("xlink", XLINK)


def _points(root: ET.Element, named: Named) -> Iterator[tuple[ET.Element, str, str]]:
    """(element, kind, name) of everything that was named; artists whose points are not as many as their
    names are left out."""
    for group in root.iter():
        kind, names = named.get(group.get("id", ""), ("", []))
        if not names:
            continue
        defined = {id(e) for part in group.iter(f"{{{SVG}}}defs") for e in part.iter()}
        kinds = (
            [e for e in group.iter(f"{{{SVG}}}{tag}") if id(e) not in defined] for tag in ("use", "path")
        )
        points = (
            [group] if len(names) == 1 else next((found for found in kinds if len(found) == len(names)), [])
        )
        if points:
            yield from ((point, kind, name) for point, name in zip(points, names, strict=True))


def titled(text: str, named: Named) -> str:
    """The file with a title for every named point, which viewers show where the pointer rests."""
    root = ET.fromstring(text)
    for element, _, name in list(_points(root, named)):
        title = ET.Element(f"{{{SVG}}}title")
        title.text = name
        element.insert(0, title)
    return ET.tostring(root, encoding="unicode", xml_declaration=True)


def inline(text: str, named: Named, name: str, caption: str, places: Mapping[str, int]) -> Markup:
    """The file as an element of the page: ids made unique, its size left to the page, text as text. Points
    of layers get ``data-layer``, their row in the page's data (``places``), other named points
    ``data-tip``."""
    root = ET.fromstring(text)
    for element, kind, value in list(_points(root, named)):
        if kind == "tip":
            element.set("data-tip", value)
        elif value in places:
            element.set("data-layer", str(places[value]))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)  # the page has the one rule that matplotlib writes
    values = [(key, value) for element in root.iter() for key, value in element.attrib.items()]
    wanted = {value[1:] for key, value in values if key == f"{{{XLINK}}}href" and value.startswith("#")}
    wanted |= {name for _, value in values for name in re.findall(r"url\(#([^)]+)\)", value)}
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id" and value not in wanted:
                del element.attrib[key]
            elif key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    root.set("style", f"width: {width / 72:.2f}in")
    root.set("role", "img")
    root.set("aria-label", caption)
    return Markup(ET.tostring(root, encoding="unicode"))
