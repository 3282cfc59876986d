"""The contract of data stores as tests: subclass ``DataStoreContract``.

Each test checks one sentence of ``DataStore``'s documentation. What happens when a process
dies in the middle of a method is not tested here: only the author of a store knows how to
provoke it. Tests of an extension that the store does not declare are skipped.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tuswsgi.core.errors import LockLost, OffsetMismatch, UploadExists, UploadGone
from tuswsgi.core.extensions import OF_STORES, Extension
from tuswsgi.core.info import FileInfo, Metadata, State, check_id, new_id
from tuswsgi.datastores.base import DataStore, Readable
from tuswsgi.lockers.base import HELD, Hold

#: More than a store takes at once, and no round number.
LARGE = hashlib.shake_256(b"tuswsgi").digest(3 * 1024 * 1024 + 7)


class Blocks:
    """A ``datastores.base.Source`` that yields the given blocks and then ends.

    :param provisional: whether the bytes count only if they are accepted.
    :param accepts: what ``accepted`` says; a body that broke off says no, too.
    :param before_answer: called with the stored bytes before ``accepted`` answers.
    :param breaks: raised after the last block, as if the process died there.
    """

    def __init__(
        self,
        *blocks: bytes,
        provisional: bool = False,
        accepts: bool = True,
        before_answer: Callable[[bytes], None] = lambda kept: None,
        breaks: BaseException | None = None,
    ) -> None:
        self.provisional = provisional
        self.asked = 0
        self._blocks = list(blocks)
        self._accepts = accepts
        self._before_answer = before_answer
        self._breaks = breaks

    def read(self, n: int) -> bytes:
        assert n > 0
        while self._blocks:
            block = self._blocks.pop(0)
            if len(block) > n:
                self._blocks.insert(0, block[n:])
            if block:
                return block[:n]
        if self._breaks is not None:
            raise self._breaks
        return b""

    def copy_to(self, fd: int, offset: int) -> int:
        start = offset
        while block := self.read(1024 * 1024):
            while block:
                written = os.pwrite(fd, block, offset)
                block = block[written:]
                offset = offset + written
        return offset - start

    def accepted(self, stored: Callable[[], Iterable[bytes]]) -> bool:
        assert self.provisional, "a source that is not provisional is not to be asked"
        assert not self._blocks, "to be asked after the end of the source"
        self.asked += 1
        self._before_answer(b"".join(stored()))
        return self._accepts


class LosesLock(Hold):
    """A lock that is lost with the last byte of a body."""

    def __init__(self, source: Blocks) -> None:
        self._source = source

    def is_lost(self) -> bool:
        return not self._source._blocks


class Died(BaseException):
    """The death of the process in the middle of a method."""


def created(store: DataStore, id: str | None = None, **fields: Any) -> FileInfo:
    """Return a new upload that was created in `store`."""
    info = FileInfo(id=new_id() if id is None else id, created_at=1.5, **fields)
    return replace(info, storage=store.create(info))


def content(store: DataStore, info: FileInfo, start: int = 0) -> bytes:
    """Return the bytes of an upload from `start` on."""
    return read_all(store.open(info, start))


def read_all(opened: Readable) -> bytes:
    """Return what is left to read, and close."""
    try:
        blocks = []
        while block := opened.read(64 * 1024):
            blocks.append(block)
        assert opened.read(1) == b"", "the end stays the end"
        return b"".join(blocks)
    finally:
        opened.close()


class DataStoreContract:
    """Tests of a ``DataStore``; define the fixture `store`, and `other` if you can."""

    @pytest.fixture
    def store(self) -> Iterator[DataStore]:
        """A prepared store without uploads."""
        raise NotImplementedError("Define the fixture `store`.")

    @pytest.fixture
    def other(self, store: DataStore) -> DataStore:
        """Another prepared store on the same data, as a second process has it."""
        pytest.skip("the bytes belong to one instance")

    @pytest.fixture
    def verifying(self, store: DataStore) -> None:
        """For stores that can take back what was not accepted."""
        if Extension.CHECKSUM not in store.extensions:
            pytest.skip("the store does not serve checksums")

    @pytest.fixture
    def concatenating(self, store: DataStore) -> None:
        """For stores that can make one upload of several."""
        if Extension.CONCATENATION not in store.extensions:
            pytest.skip("the store does not serve concatenation")

    def test_it_names_itself_and_what_it_can(self, store: DataStore) -> None:
        assert store.type
        assert store.extensions <= OF_STORES
        assert (free := store.free_space()) is None or free >= 0

    def test_it_may_be_prepared_and_closed_again(self, store: DataStore) -> None:
        info = created(store)
        store.append(info, 0, Blocks(b"kept"), HELD)
        store.prepare()
        store.close()
        store.close()
        assert store.offset(info) == 4
        store.prepare()
        assert content(store, info) == b"kept"

    def test_a_new_upload_is_empty(self, store: DataStore) -> None:
        info = created(store, size=5, metadata=Metadata.of({"filename": "../кошка"}))
        assert info.storage.type == store.type
        assert store.offset(info) == 0
        assert content(store, info) == b""
        location = store.location(info)
        assert location is None or location

    def test_an_upload_is_created_once(self, store: DataStore) -> None:
        info = created(store)
        store.append(info, 0, Blocks(b"first"), HELD)
        for second in (info, FileInfo(id=info.id)):
            with pytest.raises(UploadExists):
                store.create(second)
        assert content(store, info) == b"first"

    def test_one_of_many_creators_wins(self, store: DataStore) -> None:
        info = FileInfo(id=new_id())

        def create(_: int) -> bool:
            try:
                store.create(info)
            except UploadExists:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(create, range(8))) == 1

    def test_an_open_upload_takes_the_first_bytes(self, store: DataStore) -> None:
        info = FileInfo(id=new_id(), size=len(LARGE) + 4)
        upload = store.create_open(info)
        info = replace(info, storage=upload.storage)
        assert store.offset(info) == 0
        assert upload.append(Blocks(b"", LARGE)) == len(LARGE)
        upload.close()
        assert store.offset(info) == len(LARGE)
        assert store.append(info, len(LARGE), Blocks(b"more"), HELD) == len(LARGE) + 4
        assert content(store, info) == LARGE + b"more"

    def test_an_open_upload_may_stay_empty(self, store: DataStore) -> None:
        info = FileInfo(id=new_id())
        upload = store.create_open(info)
        upload.close()
        info = replace(info, storage=upload.storage)
        assert store.append(info, 0, Blocks(b"later"), HELD) == 5

    def test_an_open_upload_is_created_once(self, store: DataStore) -> None:
        info = created(store)
        store.append(info, 0, Blocks(b"first"), HELD)
        with pytest.raises(UploadExists):
            store.create_open(info)
        assert content(store, info) == b"first"

    @pytest.mark.usefixtures("verifying")
    @pytest.mark.parametrize("accepts", [True, False])
    def test_an_open_upload_stores_what_is_accepted(self, store: DataStore, accepts: bool) -> None:
        info = FileInfo(id=new_id())
        upload = store.create_open(info)
        info = replace(info, storage=upload.storage)
        offsets = []
        source = Blocks(
            b"first",
            provisional=True,
            accepts=accepts,
            before_answer=lambda kept: offsets.append(store.offset(info)),
        )
        assert upload.append(source) == (5 if accepts else 0)
        upload.close()
        assert offsets == [0]
        assert content(store, info) == (b"first" if accepts else b"")
        assert store.offset(info) == (5 if accepts else 0)

    @pytest.mark.parametrize(
        "id",
        [
            *("a", "Z", "0", "_", "-", "-rf", "a.b", "a..", "a~", "AaBbZz09._~-", "x" * 128),
            *("con.txt", "%2F", "a%00", "%s", "10:30", "@a=b+c;d,e", "(a)*!$'", "=" * 128),
        ],
    )
    def test_every_id_is_a_name(self, store: DataStore, id: str) -> None:
        info = created(store, check_id(id))
        assert store.append(info, 0, Blocks(id.encode()), HELD) == len(id)
        assert content(store, info) == id.encode()
        store.delete(info)
        with pytest.raises(UploadGone):
            store.offset(info)

    def test_ids_that_are_alike_are_not_the_same(self, store: DataStore) -> None:
        infos = [created(store, id) for id in ("abc", "ABC", "abc.", "abc~", "abc-", "abcd")]
        for info in infos:
            store.append(info, 0, Blocks(info.id.encode()), HELD)
        assert [content(store, info).decode() for info in infos] == [info.id for info in infos]

    def test_what_is_appended_counts(self, store: DataStore) -> None:
        info = created(store, size=None)
        kept = b""
        for blocks in ([b"a"], [b"bc", b"", b"def"], [bytes(range(256))], [b"\r\n"], [LARGE]):
            assert store.append(info, len(kept), Blocks(*blocks), HELD) == len(
                kept + b"".join(blocks)
            )
            kept += b"".join(blocks)
            assert store.offset(info) == len(kept)
            assert content(store, info) == kept

    def test_many_small_blocks(self, store: DataStore) -> None:
        info = created(store)
        assert store.append(info, 0, Blocks(*[b"%d," % n for n in range(1000)]), HELD) == 3890
        assert content(store, info) == b"".join(b"%d," % n for n in range(1000))

    @pytest.mark.parametrize("kept", [b"", b"kept"])
    def test_an_empty_source_changes_nothing(self, store: DataStore, kept: bytes) -> None:
        info = created(store)
        store.append(info, 0, Blocks(kept), HELD)
        assert store.append(info, len(kept), Blocks(), HELD) == len(kept)
        assert content(store, info) == kept

    @pytest.mark.parametrize("offset", [0, 1, 5, 9, 11, 2**31, 2**63 - 1])
    @pytest.mark.parametrize("provisional", [False, True])
    def test_a_wrong_offset_changes_nothing(
        self, store: DataStore, offset: int, provisional: bool
    ) -> None:
        if provisional and Extension.CHECKSUM not in store.extensions:
            pytest.skip("the store does not serve checksums")
        info = created(store, size=20)
        store.append(info, 0, Blocks(b"0123456789"), HELD)
        with pytest.raises(OffsetMismatch) as mismatch:
            store.append(info, offset, Blocks(b"x", provisional=provisional), HELD)
        assert mismatch.value.offset == 10
        assert store.offset(info) == 10
        assert content(store, info) == b"0123456789"

    def test_bytes_count_as_they_come(self, store: DataStore) -> None:
        # The source may fail where no contract foresees it; what it gave is there.
        info = created(store)
        store.append(info, 0, Blocks(b"one"), HELD)
        with pytest.raises(Died):
            store.append(info, 3, Blocks(b"two", breaks=Died()), HELD)
        offset = store.offset(info)
        assert 3 <= offset <= 6
        store.append(info, offset, Blocks(b"onetwo!"[offset:]), HELD)
        assert content(store, info) == b"onetwo!"

    def test_uploads_do_not_touch_each_other(self, store: DataStore) -> None:
        infos = [created(store) for _ in range(6)]

        def fill(number: int) -> None:
            for n in range(20):
                block = bytes([number]) * 1000
                assert store.append(infos[number], n * 1000, Blocks(block), HELD) == (n + 1) * 1000

        with ThreadPoolExecutor(len(infos)) as pool:
            list(pool.map(fill, range(len(infos))))
        for number, info in enumerate(infos):
            assert content(store, info) == bytes([number]) * 20_000

    @pytest.mark.usefixtures("verifying")
    @pytest.mark.parametrize("block", [b"", b"new", LARGE], ids=["none", "short", "large"])
    @pytest.mark.parametrize("accepts", [True, False])
    def test_provisional_bytes_count_if_they_are_accepted(
        self, store: DataStore, block: bytes, accepts: bool
    ) -> None:
        info = created(store)
        store.append(info, 0, Blocks(b"old"), HELD)
        seen: list[bytes] = []
        source = Blocks(block, provisional=True, accepts=accepts, before_answer=seen.append)
        kept = b"old" + block if accepts else b"old"
        assert store.append(info, 3, source, HELD) == len(kept)
        assert source.asked == 1
        assert seen == [block], "what this append stored, for a checksum that comes afterwards"
        assert store.offset(info) == len(kept)
        assert content(store, info) == kept
        assert store.append(info, len(kept), Blocks(b"more"), HELD) == len(kept) + 4
        assert content(store, info) == kept + b"more"

    @pytest.mark.usefixtures("verifying")
    def test_provisional_bytes_do_not_count_before(self, store: DataStore) -> None:
        info = created(store)
        store.append(info, 0, Blocks(b"old"), HELD)
        offsets: list[int] = []
        source = Blocks(
            b"new", provisional=True, before_answer=lambda kept: offsets.append(store.offset(info))
        )
        assert store.append(info, 3, source, HELD) == 6
        assert offsets == [3]

    @pytest.mark.usefixtures("verifying")
    @pytest.mark.parametrize("provisional", [False, True])
    def test_provisional_bytes_of_a_crash_do_not_count(
        self, store: DataStore, provisional: bool
    ) -> None:
        info = created(store)
        store.append(info, 0, Blocks(b"old"), HELD)
        with pytest.raises(Died):
            store.append(info, 3, Blocks(b"bad and long", provisional=True, breaks=Died()), HELD)
        assert store.offset(info) == 3
        with pytest.raises(OffsetMismatch):
            store.append(info, 15, Blocks(b"x"), HELD)
        assert store.append(info, 3, Blocks(b"good", provisional=provisional), HELD) == 7
        assert store.offset(info) == 7
        assert content(store, info) == b"oldgood"

    @pytest.mark.parametrize("late", ["more and more", "cut off", "accepted"])
    def test_a_late_writer_changes_nothing_after_a_seal(self, store: DataStore, late: str) -> None:
        if late != "more and more" and Extension.CHECKSUM not in store.extensions:
            pytest.skip("the store verifies nothing")
        info = created(store, size=16)
        store.append(info, 0, Blocks(b"kept"), HELD)
        sealed: list[FileInfo] = []

        class Late(Blocks):
            """A body during which another process takes the upload over."""

            def read(self, n: int) -> bytes:
                if not self._blocks and not sealed:
                    sealed.append(replace(info, storage=store.seal(info)))
                    seen = store.offset(sealed[0])
                    assert seen == (7 if late == "more and more" else 4)
                    store.append(sealed[0], seen, Blocks(b"successor"), HELD)
                    self._blocks.append(b"late, and longer than all of the others")
                return super().read(n)

        late_source = Late(b"own", provisional=late != "more and more", accepts=late == "accepted")
        store.append(info, 4, late_source, HELD)
        (taken_over,) = sealed
        kept = b"keptownsuccessor" if late == "more and more" else b"keptsuccessor"
        assert store.offset(taken_over) == len(kept)
        assert content(store, taken_over) == kept
        for start in range(len(kept) + 1):
            assert content(store, taken_over, start) == kept[start:]
        store.append(taken_over, len(kept), Blocks(b"!" * (16 - len(kept))), HELD)
        self._finish_sealed(store, taken_over, kept.ljust(16, b"!"))

    def test_an_upload_can_be_sealed_again_and_again(self, store: DataStore) -> None:
        info = created(store, size=12)
        kept = b""
        for block in (b"one,", b"", b"two,", b"last"):
            info = replace(info, storage=store.seal(info))
            assert store.offset(info) == len(kept)
            with pytest.raises(OffsetMismatch):
                store.append(info, len(kept) + 1, Blocks(b"x"), HELD)
            store.append(info, len(kept), Blocks(block), HELD)
            kept += block
            assert content(store, info) == kept
        self._finish_sealed(store, info, b"one,two,last")

    def test_two_who_seal_at_once_do_not_disturb_each_other(self, store: DataStore) -> None:
        info = created(store, size=8)
        store.append(info, 0, Blocks(b"kept"), HELD)
        winner = replace(info, storage=store.seal(info))
        store.append(winner, 4, Blocks(b"more"), HELD)
        store.seal(info)
        assert content(store, winner) == b"keptmore"

    def test_without_an_upload_there_is_nothing_to_seal(self, store: DataStore) -> None:
        info = created(store)
        store.delete(info)
        with pytest.raises(UploadGone):
            store.seal(info)

    def test_a_sealed_upload_can_be_removed(self, store: DataStore) -> None:
        info = created(store, size=8)
        store.append(info, 0, Blocks(b"kept"), HELD)
        info = replace(info, storage=store.seal(info))
        store.append(info, 4, Blocks(b"more"), HELD)
        store.delete(info)
        with pytest.raises(UploadGone):
            store.offset(info)
        with pytest.raises(UploadGone):
            store.open(info)

    def _finish_sealed(self, store: DataStore, info: FileInfo, data: bytes) -> None:
        for _ in range(2):  # as after a crash
            finished = replace(info, offset=len(data), storage=store.finish(info, HELD))
            assert content(store, finished) == data
            assert content(store, info) == data, "the record may not be saved"
        store.delete_leftovers(info)
        store.delete_leftovers(info)
        assert content(store, finished) == data
        store.delete(finished)
        with pytest.raises(UploadGone):
            store.open(finished)

    @pytest.mark.usefixtures("verifying")
    def test_what_is_accepted_too_late_does_not_count(self, store: DataStore) -> None:
        info = created(store)
        store.append(info, 0, Blocks(b"kept"), HELD)
        source = Blocks(b"late", provisional=True)
        with pytest.raises(LockLost):
            store.append(info, 4, source, LosesLock(source))
        assert store.offset(info) == 4
        assert store.append(info, 4, Blocks(b"more"), HELD) == 8
        assert content(store, info) == b"keptmore"

    def test_finishing_again_does_no_harm(self, store: DataStore) -> None:
        info = created(store, size=4)
        store.append(info, 0, Blocks(b"done"), HELD)
        done = replace(info, offset=4)
        store.finish(done, HELD)
        store.finish(done, HELD)
        assert content(store, done) == b"done"

    def test_an_empty_upload_can_be_finished(self, store: DataStore) -> None:
        info = created(store, size=0)
        store.finish(info, HELD)
        assert store.offset(info) == 0
        assert content(store, info) == b""

    def part(self, store: DataStore, data: bytes) -> FileInfo:
        """Return a finished partial upload."""
        info = created(store, size=len(data), is_partial=True)
        store.append(info, 0, Blocks(data), HELD)
        store.finish(info, HELD)
        return replace(info, offset=len(data), state=State.FINISHED, finished_at=2.5)

    def final(self, store: DataStore, *parts: FileInfo) -> FileInfo:
        """Return a final upload that waits to be made of `parts`."""
        return created(
            store,
            size=sum(part.size or 0 for part in parts),
            is_final=True,
            partial_uploads=tuple(part.id for part in parts),
            state=State.WAITING,
        )

    @pytest.mark.usefixtures("concatenating")
    def test_parts_are_joined_in_their_order(self, store: DataStore) -> None:
        one, two, none = (self.part(store, data) for data in (b"one,", b"two,", b""))
        large = self.part(store, LARGE)
        final = self.final(store, two, one, none, two, large)
        assert store.offset(final) == 0
        store.concatenate(final, [two, one, none, two, large], HELD)
        assert store.offset(final) == final.size
        assert content(store, final) == b"two,one,two," + LARGE
        assert content(store, one) == b"one,"
        assert content(store, two) == b"two,"

    @pytest.mark.usefixtures("concatenating")
    def test_joining_again_changes_nothing(self, store: DataStore) -> None:
        parts = [self.part(store, data) for data in (b"one,", b"two")]
        final = self.final(store, *parts)
        for _ in range(3):
            store.concatenate(final, parts, HELD)
            assert store.offset(final) == 7
        store.finish(final, HELD)
        assert content(store, final) == b"one,two"

    @pytest.mark.usefixtures("concatenating")
    def test_two_who_join_the_same_parts_do_not_disturb_each_other(self, store: DataStore) -> None:
        parts = [self.part(store, data) for data in (LARGE, b"two")]
        final = self.final(store, *parts)

        class Late(Hold):
            """A holder that stands still before its last step, while others do all of them."""

            def check(self) -> None:
                store.concatenate(final, parts, HELD)
                assert content(store, final) == LARGE + b"two"

        store.concatenate(final, parts, Late())
        assert content(store, final) == LARGE + b"two"

    @pytest.mark.usefixtures("concatenating")
    def test_who_has_lost_the_lock_joins_nothing(self, store: DataStore) -> None:
        part = self.part(store, b"part")
        final = self.final(store, part)
        with pytest.raises(LockLost):
            store.concatenate(final, [part], LosesLock(Blocks()))
        assert store.offset(final) == 0

    @pytest.mark.usefixtures("concatenating")
    def test_parts_without_bytes_can_be_joined(self, store: DataStore) -> None:
        part = self.part(store, b"")
        final = self.final(store, part, part)
        store.concatenate(final, [part, part], HELD)
        assert content(store, final) == b""

    @pytest.mark.usefixtures("concatenating")
    def test_without_a_part_there_is_nothing(self, store: DataStore) -> None:
        one, two = (self.part(store, data) for data in (b"one,", b"two"))
        final = self.final(store, one, two)
        store.delete(two)
        for _ in range(2):
            with pytest.raises(UploadGone):
                store.concatenate(final, [one, two], HELD)
            assert store.offset(final) == 0
            assert content(store, final) == b""

    @pytest.mark.usefixtures("concatenating")
    def test_the_final_upload_outlives_its_parts(self, store: DataStore) -> None:
        parts = [self.part(store, data) for data in (b"one,", b"two")]
        final = self.final(store, *parts)
        store.concatenate(final, parts, HELD)
        for part in parts:
            store.delete(part)
        assert content(store, final) == b"one,two"

    @pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 2**40])
    def test_reading_begins_anywhere(self, store: DataStore, start: int) -> None:
        info = created(store, size=10)
        store.append(info, 0, Blocks(b"0123456789"), HELD)
        assert content(store, info, start) == b"0123456789"[start:]

    def test_a_reader_gives_at_most_what_is_asked(self, store: DataStore) -> None:
        info = created(store)
        store.append(info, 0, Blocks(LARGE), HELD)
        opened = store.open(info, 1)
        try:
            first = opened.read(10)
            assert 1 <= len(first) <= 10
            assert LARGE[1:].startswith(first)
        finally:
            opened.close()

    def test_many_read_at_once(self, store: DataStore) -> None:
        info = created(store)
        store.append(info, 0, Blocks(LARGE), HELD)
        readers = [store.open(info, start) for start in range(8)]
        with ThreadPoolExecutor(len(readers)) as pool:
            for start, read in enumerate(pool.map(read_all, readers)):
                assert read == LARGE[start:]

    def test_who_reads_does_not_stop_who_writes(self, store: DataStore) -> None:
        info = created(store)
        store.append(info, 0, Blocks(b"one"), HELD)
        opened = store.open(info)
        try:
            store.append(info, 3, Blocks(b"two"), HELD)
            assert opened.read(3)
            assert content(store, info) == b"onetwo"
        finally:
            opened.close()

    def test_what_is_deleted_is_gone(self, store: DataStore) -> None:
        info = created(store)
        neighbour = created(store)
        for upload in (info, neighbour):
            store.append(upload, 0, Blocks(b"bytes"), HELD)
        store.delete(info)
        with pytest.raises(UploadGone):
            store.offset(info)
        with pytest.raises(UploadGone):
            store.open(info)
        with pytest.raises(UploadGone):
            store.append(info, 5, Blocks(b"x"), HELD)
        assert content(store, neighbour) == b"bytes"

    def test_deleting_again_is_no_error(self, store: DataStore) -> None:
        info = created(store)
        for _ in range(3):
            store.delete(info)
        store.delete(FileInfo(id=new_id()))

    @pytest.mark.usefixtures("verifying")
    def test_deleting_removes_what_was_left_behind(self, store: DataStore) -> None:
        info = created(store)
        with pytest.raises(Died):
            store.append(info, 0, Blocks(b"bad", provisional=True, breaks=Died()), HELD)
        store.delete(info)
        again = created(store, info.id)
        assert store.append(again, 0, Blocks(b"good"), HELD) == 4
        assert store.offset(again) == 4
        assert content(store, again) == b"good"

    @pytest.fixture
    def listing(self, store: DataStore) -> None:
        """For stores that tell what lies in them."""
        if type(store).files is DataStore.files:
            pytest.skip("the store does not tell what lies in it")

    def test_files_are_listed_by_their_age(self, store: DataStore, listing: None) -> None:
        before = time.time() - 60
        info = created(store)
        other = created(store)
        store.append(info, 0, Blocks(b"bytes"), HELD)
        assert list(store.files(before)) == []
        found = {file.upload: file for file in store.files(time.time() + 60)}
        assert set(found) == {info.id, other.id}
        file = found[info.id]
        assert (file.storage.path, file.size) == (info.storage.path, 5)
        assert abs(file.changed_at - time.time()) < 60
        assert not file.is_temporary

    def test_a_file_is_deleted_once(self, store: DataStore, listing: None) -> None:
        info = created(store)
        neighbour = created(store)
        store.append(neighbour, 0, Blocks(b"bytes"), HELD)
        (file,) = (file for file in store.files(time.time() + 60) if file.upload == info.id)
        assert store.delete_file(file)
        assert not store.delete_file(file)
        with pytest.raises(UploadGone):
            store.offset(info)
        assert content(store, neighbour) == b"bytes"

    def test_a_changed_file_is_not_deleted(self, store: DataStore, listing: None) -> None:
        info = created(store)
        (file,) = store.files(time.time() + 60)
        store.append(info, 0, Blocks(b"bytes"), HELD)
        assert not store.delete_file(file)
        assert content(store, info) == b"bytes"

    @pytest.fixture
    def quarantining(self, store: DataStore, listing: None) -> None:
        """For stores that have a quarantine."""
        info = created(store)
        (file,) = store.files(time.time() + 60)
        if store.quarantine(file) is None:
            assert store.offset(info) == 0
            pytest.skip("the store has no quarantine")
        (found,) = store.quarantined()
        assert store.discard(found)

    def test_a_file_in_the_quarantine_is_no_upload(
        self, store: DataStore, quarantining: None
    ) -> None:
        info = created(store)
        neighbour = created(store)
        store.append(info, 0, Blocks(b"bytes"), HELD)
        (file,) = (file for file in store.files(time.time() + 60) if file.upload == info.id)
        moved = store.quarantine(file)
        assert moved is not None
        assert moved.file == file
        assert abs(moved.moved_at - time.time()) < 60
        assert list(store.quarantined()) == [moved]
        assert store.quarantine(file) is None
        assert [file.upload for file in store.files(time.time() + 60)] == [neighbour.id]
        with pytest.raises(UploadGone):
            store.offset(info)

    def test_a_file_that_has_changed_is_not_moved(
        self, store: DataStore, quarantining: None
    ) -> None:
        info = created(store)
        (file,) = store.files(time.time() + 60)
        store.append(info, 0, Blocks(b"bytes"), HELD)
        assert store.quarantine(file) is None
        assert content(store, info) == b"bytes"

    def test_a_file_is_restored(self, store: DataStore, quarantining: None) -> None:
        info = created(store)
        store.append(info, 0, Blocks(b"bytes"), HELD)
        (file,) = store.files(time.time() + 60)
        moved = store.quarantine(file)
        assert moved is not None
        assert store.restore(moved)
        assert not store.restore(moved)
        assert list(store.quarantined()) == []
        assert content(store, info) == b"bytes"
        store.append(info, 5, Blocks(b" more"), HELD)
        assert content(store, info) == b"bytes more"

    def test_a_file_never_replaces_another(self, store: DataStore, quarantining: None) -> None:
        info = created(store)
        store.append(info, 0, Blocks(b"first"), HELD)
        (file,) = store.files(time.time() + 60)
        assert (first := store.quarantine(file)) is not None
        store.create(info)
        store.append(info, 0, Blocks(b"second"), HELD)
        assert not store.restore(first)
        assert content(store, info) == b"second"
        # Both stay if the second one is moved there, too.
        (file,) = store.files(time.time() + 60)
        assert (second := store.quarantine(file)) is not None
        assert sorted(found.file.size for found in store.quarantined()) == [5, 6]
        assert store.restore(first)
        assert content(store, info) == b"first"
        assert store.discard(second)
        assert not store.discard(second)
        assert list(store.quarantined()) == []

    def test_another_instance_sees_the_same(self, store: DataStore, other: DataStore) -> None:
        info = created(store)
        with pytest.raises(UploadExists):
            other.create(FileInfo(id=info.id))
        store.append(info, 0, Blocks(b"one,"), HELD)
        assert other.offset(info) == 4
        other.append(info, 4, Blocks(b"two"), HELD)
        assert store.offset(info) == 7
        assert content(store, info) == content(other, info) == b"one,two"
        other.delete(info)
        with pytest.raises(UploadGone):
            store.offset(info)

    @pytest.mark.usefixtures("verifying")
    def test_another_instance_sees_no_provisional_bytes(
        self, store: DataStore, other: DataStore
    ) -> None:
        info = created(store)
        offsets = []
        source = Blocks(
            b"new", provisional=True, before_answer=lambda kept: offsets.append(other.offset(info))
        )
        store.append(info, 0, source, HELD)
        assert offsets == [0]
        assert other.offset(info) == 3

    @pytest.mark.usefixtures("concatenating")
    def test_another_instance_can_join(self, store: DataStore, other: DataStore) -> None:
        parts = [self.part(store, b"one,"), self.part(other, b"two")]
        final = self.final(store, *parts)
        other.concatenate(final, parts, HELD)
        assert content(store, final) == b"one,two"
