"""Folders of files that are never opened, and what a search finds in them."""

import json
import os

from hpdm.data.finding import find_clips, survey

BOM = b"\xef\xbb\xbf"


def put(root, *names, content=b"never opened"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def clips(root, **options):
    """Paths relative to the root, and the class names of the clips."""
    names, files = find_clips(root, **options)
    return [(os.path.relpath(f.path, root), names[f.label] if names else None) for f in files]


def left_out(root, **options):
    """Reason -> (count, places relative to the root)."""
    return {
        item.reason: (item.count, [place.replace(f"{root}/", "") for place in item.places])
        for item in survey(root, **options).left_out
    }


def captions(root, **options):
    return {os.path.relpath(f.path, root): f.caption for f in find_clips(root, captions=True, **options)[1]}


def lines(*records):
    return "".join(json.dumps({"file": file, "caption": caption}) + "\n" for file, caption in records)
