"""Reads a ggml file of a Whisper, as whisper.cpp reads it."""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

import numpy as np


def read_ggml(file: BinaryIO) -> tuple[Any, ...]:
    """The sizes, filters, tokens and tensors; a tensor is its shape from the last dimension, its type, and its data."""
    header = struct.unpack("<I11i", file.read(48))
    rows, columns = struct.unpack("<2i", file.read(8))
    filters = np.frombuffer(file.read(4 * rows * columns), "<f4").reshape(rows, columns)
    (count,) = struct.unpack("<i", file.read(4))
    tokens = [file.read(struct.unpack("<I", file.read(4))[0]) for _ in range(count)]
    tensors = {}
    while start := file.read(12):
        dimensions, length, kind = struct.unpack("<3i", start)
        shape = struct.unpack(f"<{dimensions}i", file.read(4 * dimensions))
        name = file.read(length).decode()
        bits = {0: 32, 1: 16, 2: 4.5}[kind]
        tensors[name] = (shape, kind, file.read(int(np.prod(shape) * bits / 8)))
    return header, filters, tokens, tensors
