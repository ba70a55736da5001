"""Jobs tell, stop and take turns; nothing is timed, every wait is for an event."""

import threading

import pytest

from sparsediff.demo.jobs import Cancelled, Job, Turns


def test_a_job_tells_in_order_and_ends():
    def work(job):
        for i in range(5):
            job.tell(i)

    assert list(Job(work).events()) == [0, 1, 2, 3, 4]


def test_an_error_reaches_whoever_listens_after_what_was_told():
    def work(job):
        job.tell("first")
        raise ValueError("no such thing")

    events = Job(work).events()
    assert next(events) == "first"
    with pytest.raises(ValueError, match="no such thing"):
        next(events)


def test_cancelling_ends_a_job_at_its_next_check():
    reached = []

    def work(job):
        job.tell("running")
        while True:
            job.check()

    job = Job(work)
    with pytest.raises(Cancelled):  # noqa: PT012
        for event in job.events():
            reached.append(event)
            job.cancel()
    assert reached == ["running"]
    assert job.wait(5)


def test_leaving_early_cancels():
    job = Job(lambda job: [job.tell("x"), job._cancelled.wait(5), job.check()])
    events = job.events()
    next(events)
    events.close()
    assert job.cancelled
    assert job.wait(5)


def test_turns_are_taken_in_the_order_of_asking_and_one_at_a_time():
    turns, order, inside = Turns(), [], []
    first_in, go = threading.Event(), threading.Event()
    queued = [threading.Event() for _ in range(3)]

    def work(name):
        def run(job):
            with turns.turn(job, lambda ahead: queued[name].set()):
                inside.append(name)
                assert len(inside) == 1
                if name == 0:
                    first_in.set()
                    assert go.wait(5)
                order.append(name)
                inside.remove(name)

        return run

    jobs = [Job(work(i)) for i in range(3)]
    threads = []
    for i, job in enumerate(jobs):
        threads.append(threading.Thread(target=lambda job=job: list(job.events())))
        threads[-1].start()
        assert (first_in if i == 0 else queued[i]).wait(5)
    go.set()
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2]


def test_who_waits_is_told_how_many_come_first_and_may_give_up():
    turns, told = Turns(), []
    held = Job(lambda job: None)
    with turns.turn(held, told.append):

        def work(job):
            with turns.turn(job, job.tell):
                raise AssertionError("it was not its turn")

        waiting = Job(work)
        with pytest.raises(Cancelled):  # noqa: PT012
            for ahead in waiting.events():
                told.append(ahead)
                waiting.cancel()
    assert told == [1]
    entered = []
    with turns.turn(held, told.append):
        entered.append(True)  # who gave up no longer stands in the way
    assert entered == [True]
    assert told == [1]
