"""Cores of the two computing roles."""

import os

import pytest

from securemtk.support.cores import own_cores


@pytest.fixture
def two_cores():
    """Let this thread use two cores at most; how many the machine has decides nothing."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)[:2]
    if len(cores) < 2:
        pytest.fail("the tests must run on 2 cores or more; this machine gives one")
    os.sched_setaffinity(0, cores)
    yield cores
    os.sched_setaffinity(0, before)


def test_both_sides_have_cores_of_their_own_and_give_them_back(two_cores):
    with own_cores(False, threads=1):
        assert os.sched_getaffinity(0) == {two_cores[0]}
    with own_cores(True, threads=1):
        assert os.sched_getaffinity(0) == {two_cores[1]}
    assert os.sched_getaffinity(0) == set(two_cores)
    with pytest.raises(KeyError), own_cores(True, threads=1):
        raise KeyError
    assert os.sched_getaffinity(0) == set(two_cores)


def test_a_side_with_several_threads_or_one_core_stays_where_it_is(two_cores):
    with own_cores(True, threads=2):
        assert os.sched_getaffinity(0) == set(two_cores)
    os.sched_setaffinity(0, two_cores[:1])
    with own_cores(True, threads=1):
        assert os.sched_getaffinity(0) == set(two_cores[:1])
