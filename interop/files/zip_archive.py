"""The part of the zip format that PyTorch's files use, read strictly: every member checked, none unpacked unasked.

Structures: PKWARE's APPNOTE.TXT, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end).
"""

import dataclasses
import struct
import zlib
from typing import Any, NoReturn

from interop.files.budget import CHECKED
from interop.files.disk import CheckpointError, Data
from interop.files.stand_ins import name_of

_LOCAL, _CENTRAL, _END, _END64, _LOCATOR64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A file in the archive: where its bytes are."""

    name: str
    offset: int  # of the first byte, in Data
    size: int
    packed_size: int
    packed: bool
    crc: int


class Archive:
    """The members of a zip archive that is a whole file, or a part of one (`start`, `size`).

    Raises CheckpointError for what is no archive, for names that appear twice, members that overlap, lie outside of the
    archive or disagree with their own headers, for encryption, and for sizes that only a bomb has.
    """

    def __init__(self, data: Data, start: int = 0, size: int | None = None) -> None:
        self.data, self.start = data, start
        self.size = data.size - start if size is None else size
        self.members: dict[str, Member] = {}
        offset, length, count = self._end()
        data.budget.spend(memory=length + 350 * count, steps=30 * count)
        directory = self.data.read(start + offset, length)
        spans, position = [], 0
        for _ in range(count):
            member, low, position = self._member(directory, position)
            if member.name in self.members:
                self._fail(f"entry {name_of(member.name)} appears twice")
            self.members[member.name] = member
            spans.append((low, member.offset + member.packed_size, member.name))
        if position != length:
            self._fail("its directory is longer than its entries")
        end, before = start, ""
        for low, high, name in sorted(spans):
            if low < end:
                self._fail(f"entries {name_of(before)} and {name_of(name)} overlap")
            end, before = high, name
        if end > start + offset:
            self._fail(f"entry {name_of(before)} overlaps the directory")

    def verify(self, member: Member) -> None:
        """Compares a stored member with its checksum. torch.save can be told to write none; it is 0 then."""
        if not member.packed and member.crc and self.data.crc32(member.offset, member.size) != member.crc:
            self._fail(f"entry {name_of(member.name)} is damaged: its checksum does not match")

    def open(self, member: Member) -> tuple[Data, int]:
        """The member's bytes: the archive itself and an offset, or what was packed, unpacked into memory."""
        if not member.packed:
            return self.data, member.offset
        # what is unpacked stays in memory: weights hardly shrink, bombs do
        self.data.budget.spend(
            memory=member.size + member.packed_size, steps=(member.size + member.packed_size) // CHECKED
        )
        machine = zlib.decompressobj(-15)
        try:
            content = machine.decompress(self.data.read(member.offset, member.packed_size), member.size + 1)
        except zlib.error as error:
            raise CheckpointError(self.data.path, f"entry {name_of(member.name)} cannot be unpacked: {error}") from None
        if len(content) != member.size or not machine.eof or (member.crc and zlib.crc32(content) != member.crc):
            self._fail(f"entry {name_of(member.name)} is damaged: it does not unpack to what is announced")
        return Data(content, self.data.path, self.data.budget), 0

    def read(self, member: Member) -> bytes:
        """A copy of the member's bytes."""
        data, offset = self.open(member)
        return data.read(offset, member.size)

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(self.data.path, problem)

    def _at(self, offset: int, code: str, magic: bytes, what: str) -> tuple[Any, ...]:
        size = struct.calcsize(code)
        if offset < 0 or offset + size > self.size:
            self._fail(f"is truncated or no zip archive: {what} lies outside of it")
        content = self.data.read(self.start + offset, size)
        if content[:4] != magic:
            self._fail(f"is damaged or no zip archive: {what} is not where it should be")
        return struct.unpack(code, content)

    def _end(self) -> tuple[int, int, int]:
        """Offset, size and number of entries of the central directory."""
        tail = self.data.read(self.start + max(0, self.size - 65557), min(self.size, 65557))
        found = tail.rfind(_END)
        if found < 0:
            self._fail("is truncated: a zip archive without its end")
        end = self.size - len(tail) + found
        fields = self._at(end, "<4s4H2LH", _END, "the end of its directory")
        disk, first, here, count, length, offset, comment = fields[1:]
        if end + 22 + comment != self.size:
            self._fail("is truncated or has something after its end")
        limit = end
        if end >= 20 and self.data.read(self.start + end - 20, 4) == _LOCATOR64:
            limit = self._at(end - 20, "<4sLQL", _LOCATOR64, "the locator of its directory")[2]
            _, _, _, _, disk, first, here, count, length, offset = self._at(
                limit, "<4sQ2H2L4Q", _END64, "the end of its large directory"
            )
        if disk or first or here != count:
            self._fail("is a zip archive in several parts")
        if offset + length != limit or count * 46 > length:
            self._fail(f"its directory of {count} entries and {length} bytes is not where it should be")
        return offset, length, count

    def _member(self, directory: bytes, position: int) -> tuple[Member, int, int]:
        """The next member, where its header begins, and the position of the next entry in the directory."""
        if position + 46 > len(directory) or directory[position : position + 4] != _CENTRAL:
            self._fail("its directory is damaged")
        flags, method, _, _, crc, packed_size, size, name_size, extra_size, comment_size = struct.unpack(
            "<4H3L3H", directory[position + 8 : position + 34]
        )
        (offset,) = struct.unpack("<L", directory[position + 42 : position + 46])
        middle = position + 46 + name_size
        next_position = middle + extra_size + comment_size
        if next_position > len(directory):
            self._fail("its directory is damaged")
        try:
            name = directory[position + 46 : middle].decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"entry {name_of(directory[position + 46 : middle])}: its name is not UTF-8")
        extra = directory[middle : middle + extra_size]
        size, packed_size, offset = _large(extra, size, packed_size, offset)
        if flags & 1:
            self._fail(f"entry {name_of(name)} is encrypted")
        if method not in (0, 8):
            self._fail(
                f"entry {name_of(name)} is packed with method {method}; PyTorch stores, and deflate is understood too"
            )
        header = self._at(offset, "<4s5H3L2H", _LOCAL, f"the header of entry {name_of(name)}")
        begin = offset + 30 + header[9] + header[10]
        if self.data.read(self.start + offset + 30, header[9]) != directory[position + 46 : middle]:
            self._fail(f"entry {name_of(name)} has another name in its own header")
        if header[3] != method or (method == 0 and size != packed_size):
            self._fail(f"entry {name_of(name)} is described in two ways")
        if begin + packed_size > self.size:
            self._fail(f"is truncated: entry {name_of(name)} of {packed_size} bytes lies outside of it")
        member = Member(name, self.start + begin, size, packed_size, method == 8, crc)
        return member, self.start + offset, next_position


def _large(extra: bytes, size: int, packed_size: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset with those that are all ones taken from the zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack("<2H", extra[position : position + 4])
        if kind == 1:
            field = extra[position + 4 : position + 4 + length]
            values = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
            large = [next(values, n) if n == 0xFFFFFFFF else n for n in (size, packed_size, offset)]
            return large[0], large[1], large[2]
        position += 4 + length
    return size, packed_size, offset
