"""Guarantees of parcels, a test a line."""

import struct

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from core.parcel import ENTRY, MOST_ARRAYS, PARCEL, SMALL_BYTES, close_parcel, open_parcel


def a_record(**more):
    generator = np.random.default_rng(0)
    arrays = {
        "student/bias": generator.normal(size=3).astype(np.float32),
        "student/large": np.zeros(SMALL_BYTES // 4, np.float32),  # with its header above the bound
        "student/matrix": np.asfortranarray(generator.normal(size=(4, 5)).astype(np.float16)),
        "prototype_counts/ct": np.array([], np.float32),
        "student/scale": np.array(2.5, np.float32),
    } | more
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def numbers(record):
    return {n: (a.dtype, a.shape, a.numpy().tobytes("A")) for n, a in record.items()}


def test_small_arrays_travel_in_one_and_come_back_bit_for_bit():
    record = a_record()
    before = numbers(record)
    close_parcel(record, Array)
    assert set(record) == {"student/large", PARCEL}
    open_parcel(record, Array)
    assert numbers(record) == before


def test_a_message_of_a_hundred_small_arrays_is_ten_objects_or_fewer():
    record = ArrayRecord({f"student/{i}": Array(np.full(4, i, np.float32)) for i in range(100)})
    assert len(get_all_nested_objects(RecordDict({"arrays": record}))) > 200
    close_parcel(record, Array)
    assert len(get_all_nested_objects(RecordDict({"arrays": record}))) <= 10


def test_closing_twice_closes_once():
    record = a_record()
    close_parcel(record, Array)
    once = record[PARCEL].data
    record["student/late"] = record["student/later"] = Array(np.zeros(1))
    close_parcel(record, Array)
    assert record[PARCEL].data == once


def test_a_record_of_no_two_small_arrays_is_left_alone():
    for names in ((), ("student/bias",)):
        record = ArrayRecord({name: Array(np.zeros(2)) for name in names})
        close_parcel(record, Array)
        open_parcel(record, Array)
        assert list(record) == list(names)


def entry(name, array, length=None):
    data = Array(np.asarray(array)).data
    return ENTRY.pack(len(name), len(data) if length is None else length) + name + data


GOOD = entry(b"student/a", np.zeros(2, np.float32))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD + b"\0",
        GOOD[:-1],
        GOOD + GOOD,  # a name twice
        entry(b"student/a", np.zeros(2), length=2**32 - 1),
        entry(PARCEL.encode(), np.zeros(2)),
        entry(b"student/\xff", np.zeros(2)),
        entry(b"student/a", np.zeros(SMALL_BYTES, np.uint8)),
        struct.pack("<HI", 65535, 4),
        ENTRY.pack(1, 9) + b"a" + b"not numpy",
        ENTRY.pack(1, 0) + b"a",
        entry(b"student/a", np.array(["text"])),
        entry(b"student/b", np.zeros(2)),  # the record has one of that name
        b"".join(entry(b"%d" % i, np.zeros(0)) for i in range(MOST_ARRAYS + 1)),
    ],
)
def test_what_is_no_parcel_stays_closed(data):
    record = ArrayRecord({"student/b": Array(np.ones(3))})
    record[PARCEL] = Array(np.frombuffer(data, np.uint8))
    open_parcel(record, Array)
    assert set(record) == {"student/b", PARCEL}
    assert record[PARCEL].numpy().tobytes() == data


def test_a_parcel_of_other_bytes_than_a_row_of_them_stays_closed():
    row = np.frombuffer(GOOD, np.uint8)
    odd = [
        Array(row[None]),
        Array(row.astype(np.int16)),
        Array("uint8", (1,), "numpy.ndarray", b""),
    ]
    for array in odd:
        record = ArrayRecord({PARCEL: array})
        open_parcel(record, Array)
        assert list(record) == [PARCEL]


def test_as_many_arrays_as_a_parcel_takes_come_back_and_the_rest_travel_alone():
    names = [f"student/{i}" for i in range(MOST_ARRAYS + 3)]
    record = ArrayRecord({name: Array(np.zeros(1)) for name in names})
    close_parcel(record, Array)
    assert len(record) == 4
    open_parcel(record, Array)
    assert set(record) == set(names)
