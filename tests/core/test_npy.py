"""Guarantees of the strict reader, a test a line."""

import io
import pickle
import resource
import struct

import numpy as np
import pytest
from flwr.app import Array

from core.npy import NotAnArray, read_npy


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def crafted(shape, descr="'<f4'", numbers=b"", version=1):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes((version, 0)) + length + header.encode() + numbers


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int64, np.uint8, ">f4"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (0, 5)])
def test_what_numpy_saves_comes_back_bit_for_bit(dtype, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    for one in (np.asarray(array), np.asfortranarray(array), np.asarray(array).T):
        again = read_npy(saved(one))
        assert again.dtype == one.dtype
        assert again.shape == one.shape
        assert again.tobytes() == one.tobytes()


def test_what_flower_carries_comes_back():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert read_npy(Array(array).data).tolist() == array.tolist()


class Planted:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled():
    objects = np.array([Planted()], dtype=object)
    whole = saved(objects, allow_pickle=True)
    for data in (whole, pickle.dumps(Planted()), crafted("(1,)", "'|O'", pickle.dumps(Planted()))):
        with pytest.raises(NotAnArray):
            read_npy(data)
        with pytest.raises(ValueError, match="pickle"):  # Flower's own reader, too
            Array("object", (1,), "numpy.ndarray", data).numpy()


def test_no_memory_is_taken_for_what_a_header_claims():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shape in ("(1000000000000,)", "(100000, 100000)", f"({10**400},)", "(4294967296, 2)"):
        with pytest.raises(NotAnArray, match="16 bytes of numbers are not what its shape"):
            read_npy(crafted(shape, numbers=bytes(16)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


BAD = {
    "empty": b"",
    "no array": b"not an array",
    "zip": b"PK\x03\x04" + bytes(100),
    "cut": saved(np.zeros(9, np.float32))[:-4],
    "cut header": saved(np.zeros(9, np.float32))[:40],
    "too long": saved(np.zeros(9, np.float32)) + b"x",
    "negative side": crafted("(-4,)", numbers=bytes(16)),
    "negative sides": crafted("(-2, -2)", numbers=bytes(16)),
    "truth as a side": crafted("(True, 4)", numbers=bytes(16)),
    "no shape": crafted("4", numbers=bytes(16)),
    "text": crafted("(4,)", "'<U1'", bytes(16)),
    "nothing wide": crafted("(4,)", "'|V0'"),
    "record": crafted("(2,)", "[('a', '<f4'), ('b', '<f4')]", bytes(16)),
    "inner shape": crafted("(2,)", "('<f4', (2,))", bytes(16)),
    "complex": crafted("(2,)", "'<c8'", bytes(16)),
    "dates": crafted("(2,)", "'<M8[s]'", bytes(16)),
    "truth": crafted("(4,)", "'|b1'", bytes(4)),
    "long double": crafted("(1,)", "'<f16'", bytes(16)),
    "version": crafted("(4,)", numbers=bytes(16), version=9),
    "code": crafted("__import__('os').abort()", numbers=bytes(16)),
    "nested": crafted("(" * 900, numbers=bytes(16)),
    "signs": crafted("(" + "-" * 900 + "1,)", numbers=bytes(16)),
    "long header": crafted("(4," + " " * 60_000 + ")", numbers=bytes(16), version=2),
}


@pytest.mark.parametrize("case", BAD)
def test_bytes_that_are_not_one_plain_array_are_refused(case):
    with pytest.raises(NotAnArray) as caught:
        read_npy(BAD[case])
    assert len(str(caught.value)) < 120
