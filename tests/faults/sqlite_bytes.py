"""Bytes as SQLite has them in its files, right but for what harms: pages of trees, write-ahead logs."""

import struct


def log_of(frames, size, pages_after, chance):
    """The bytes of a write-ahead log with these pages and right checksums, sometimes with a wrong number."""
    salt = chance.randbytes(8)
    head = struct.pack(">IIII", 0x377F0682, 3007000, size, 0) + salt
    sums = checksum(head, (0, 0))
    parts = [head + struct.pack(">II", *sums)]
    for number, (page, data) in enumerate(frames):
        last = number == len(frames) - 1
        end = chance.choice([pages_after] * 6 + [1, 2**31, 10**6]) if last else 0
        start = struct.pack(">II", chance.choice([page] * 20 + [1, 2**31]), end)
        sums = checksum(start + data, sums)
        parts.append(start + salt + struct.pack(">II", *sums) + data)
    return b"".join(parts)


def checksum(data, sums):
    """SQLite's checksum of a log, for words with the low byte first."""
    one, two = sums
    for low, high in struct.iter_unpack("<II", data):
        one = (one + low + two) & 0xFFFFFFFF
        two = (two + high + one) & 0xFFFFFFFF
    return one, two


def interior(size, root, child, index, chance):
    """An interior page all of whose children are one page."""
    cells = chance.choice([1, 20, 200])
    page = bytearray(size)
    page[0] = 2 if index else 5
    body = b"\x03\x01\x01\x01" if index else b"\x01"
    at = size
    for number in range(cells):
        at -= 4 + len(body)
        page[at : at + 4 + len(body)] = struct.pack(">I", child) + body
        struct.pack_into(">H", page, 12 + 2 * number, at)
    struct.pack_into(">HHHB", page, 1, 0, cells, at, 0)
    struct.pack_into(">I", page, 8, chance.choice([child, root]))
    return page


def long_rows(size, chain, chance):
    """A leaf of rows, each as long as SQLite has them, most of it on a page that names itself as the next."""
    page = bytearray(size)
    least = (size - 12) * 32 // 255 - 23
    column = chance.choice(["key", "tag", "filename", "value"])
    at, cells = size, 0
    while at - least - 20 > 8 + 2 * (cells + 1):
        claimed = least + chance.choice([1000, 50_000, 100_000]) * (size - 4)
        kind = chance.choice([12, 13]) + 2 * (claimed - 200)
        serials = [0, 76 if column != "key" else kind, 9, 7, 0, 0, 8, 77 if column != "tag" else kind, 8, 9]
        serials += [0 if column != "filename" else kind, 12 if column != "value" else kind]
        header = b"".join(map(varint, serials))
        body = varint(len(header) + 1) + header + chance.randbytes(32) + bytes(8) + b"f" * 32
        body = body.ljust(least, b"x")[:least]
        cell = varint(claimed) + varint(cells + 1) + body + struct.pack(">I", chain)
        at -= len(cell)
        page[at : at + len(cell)] = cell
        struct.pack_into(">H", page, 8 + 2 * cells, at)
        cells += 1
    struct.pack_into(">BHHHB", page, 0, 13, 0, cells, at, 0)
    return page


def varint(number):
    """A number as SQLite writes it."""
    groups = [number & 127]
    while number := number >> 7:
        groups.append(number & 127 | 128)
    return bytes(reversed(groups))
