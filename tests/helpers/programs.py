"""Arrays of compiled programs, read from their HLO text."""

import collections
import math
import re


def largest_arrays(hlo_text):
    """Returns the number of elements of the largest array of each type in a program."""
    largest = {}
    for dtype, shape in re.findall(r"\b(pred|[usbf]\w*\d)\[([\d,]*)\]", hlo_text):
        size = math.prod(int(length) for length in shape.split(",") if length)
        largest[dtype] = max(largest.get(dtype, 0), size)
    return largest


def carried_arrays(hlo_text):
    """Returns how often the loops of a program carry arrays of each element type and size, of whatever shape:
    the number in the loop that has the most of them."""
    found = collections.Counter()
    for carried in re.findall(r"= \((.*?)\) while\(", hlo_text):
        arrays = re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", carried)
        found |= collections.Counter((kind, math.prod(map(int, shape.split(",")))) for kind, shape in arrays)
    return found
