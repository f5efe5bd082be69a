"""How far reading and decoding run ahead of whoever takes the batches: a few batches, however many there are."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from data_pipeline.decode import QUEUE_DEPTH, Decoder
from data_pipeline.read_ahead import READ_AHEAD_BATCHES, Load, decode_ahead
from tests.pictures import JPEGS, settings


def test_no_more_than_a_few_batches_are_held_at_a_time():
    taken = []

    def load(number):
        return Load(0, number, np.array([number]), [JPEGS[number % len(JPEGS)]])

    def jobs():
        for number in range(40):
            taken.append(number)
            yield partial(load, number)

    decoder = Decoder(settings())
    with ThreadPoolExecutor(2) as pool:
        for done, (ready, images) in enumerate(decode_ahead(decoder, pool, jobs(), repair=lambda load: load), start=1):
            assert ready.step == done - 1 and len(images) == 1
            assert len(taken) - done <= READ_AHEAD_BATCHES + QUEUE_DEPTH
    assert len(taken) == 40
    decoder.close()
