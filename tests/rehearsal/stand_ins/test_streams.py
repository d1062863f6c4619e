"""Who waits for a call that continues in a stream of its own."""

from w2s.rehearsal.stand_ins.streams import Streams
from w2s.rehearsal.tape import Tape, Wait


def test_the_gpu_waits_for_a_stream_when_it_is_told_to() -> None:
    tape = Tape(0)
    streams = Streams(tape)
    computing, beside = streams.current, streams.Stream()
    with streams.on(beside):
        streams.wait({0: 7})
        streams.wait({0: 8, 1: 9})
    assert not tape.events
    event = beside.record_event()
    with streams.on(beside):
        streams.wait({1: 10})
    event.wait()
    assert [each.call for each in tape.events if isinstance(each, Wait)] == [8, 9]
    computing.wait_stream(beside)
    assert [each.call for each in tape.events if isinstance(each, Wait)] == [8, 9, 8, 10]


def test_streams_wait_for_one_another() -> None:
    tape = Tape(0)
    streams = Streams(tape)
    first, second = streams.Stream(), streams.Stream()
    with streams.on(first):
        streams.wait({0: 1})
    second.wait_stream(first)
    second.wait_stream(streams.current)
    assert not tape.events and second.calls == {0: 1}
    streams.current.wait_event(second.record_event())
    assert [each.call for each in tape.events if isinstance(each, Wait)] == [1]
