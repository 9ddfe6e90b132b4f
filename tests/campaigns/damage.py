"""Ways to damage a file, and ways to change its content so that it does harm."""

import copy
import json
import os
import pathlib
import shutil

import numpy as np

_VALUES = [None, True, -1, 0, 1, 7, 2.5, 10**7, 10**30, 10**400, 1e308, float("nan"), float("inf"), "", "x", "../../x",
           "/etc/passwd", "\\", "\0", "\ud800", [], [[]], [None], {}, {"a": 1}, [1] * 1000, "y" * 10_000]


def damaged(content: bytes, rng: np.random.Generator) -> bytes | None:
    """A damaged version of a file; `None` for no file."""
    at = int(rng.integers(max(len(content), 1)))
    bit = int(rng.integers(8))
    length = int(rng.integers(1, 1 + max(1, len(content) // 8)))
    return [
        lambda: content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1:] if content else b"x",
        lambda: content[:at], lambda: content[:at] + b"\0" * length + content[at + length:],
        lambda: content[:at] + rng.bytes(length) + content[at:], lambda: content[:at] + content[at + length:],
        lambda: b"\0" * len(content), lambda: None, lambda: rng.bytes(len(content)), lambda: content + content,
        lambda: b"[" * 100_000, lambda: _other_type(content, rng),
    ][int(rng.integers(11))]()


def _other_type(content: bytes, rng: np.random.Generator) -> bytes:
    """Replaces one value in JSON by a value of another type; other files are returned without a
    change."""
    try:
        value = json.loads(content)
    except ValueError:
        return content
    place = value
    while isinstance(place, (dict, list)) and place:
        key = list(place)[int(rng.integers(len(place)))] if isinstance(place, dict) else int(rng.integers(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.4:
            place[key] = [None, -1, 10**30, 10**400, 1e308, "x", [], {}, True, [[]], {"a": {}}][int(rng.integers(11))]
            break
        place = place[key]
    return json.dumps(value).encode()


def one_file(directory: pathlib.Path, rng: np.random.Generator) -> pathlib.Path:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return files[int(rng.integers(len(files)))]


def damage(path: pathlib.Path, rng: np.random.Generator) -> None:
    """Damages a file, deletes it, or puts a named pipe or a directory in its place."""
    content = path.read_bytes()
    path.unlink()
    if rng.random() < 0.1:
        os.mkfifo(path) if rng.random() < 0.5 else path.mkdir()
        return
    content = damaged(content, rng)
    if content is not None:
        path.write_bytes(content)


def copied(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Copies a directory to the place of an earlier copy."""
    shutil.rmtree(target, ignore_errors=True)
    return pathlib.Path(shutil.copytree(source, target))


def hostile_json(text: str, rng: np.random.Generator) -> str:
    """JSON with one to three values replaced, left out, or added."""
    value = json.loads(text)
    for _ in range(int(rng.integers(1, 4))):
        place = value
        while isinstance(place, (dict, list)) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = keys[int(rng.integers(len(place)))]
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
                if rng.random() < 0.2:
                    del place[key]
                else:
                    # A copy, because a later change may descend into it.
                    place[key] = copy.deepcopy(_VALUES[int(rng.integers(len(_VALUES)))])
                break
            place = place[key]
    return json.dumps(value)


def hostile_tensors(content: bytes, rng: np.random.Generator) -> bytes:
    """A safetensors file with a changed header."""
    length = int.from_bytes(content[:8], "little")
    header = hostile_json(content[8:8 + length].decode(), rng).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length:]
