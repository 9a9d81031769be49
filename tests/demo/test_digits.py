"""secateur.demo.digits: real images, a plain model, and a plain loop that leaves its caller alone."""

import torch

from secateur.demo import digits


def test_the_data_are_all_there_and_split_without_overlap(data):
    assert data.train_images.shape == (1347, 8, 8)
    assert data.test_images.shape == (450, 8, 8)
    images = torch.cat([data.train_images, data.test_images])
    assert images.min() == 0
    assert images.max() == 1
    assert torch.cat([data.train_labels, data.test_labels]).bincount().tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180
    ]  # fmt: skip
    assert data.test_labels.bincount(minlength=10).min() >= 30
    assert torch.equal(data.test_images, digits.load().test_images)


def test_it_learns_and_looks_after_each_epoch(data):
    seen = []
    with digits.alone(0):
        model = digits.LSTMClassifier(hidden=32)
        before = digits.accuracy(model, data)
        digits.train(model, digits.adam(model), data, 2, after_epoch=lambda m: seen.append(digits.accuracy(m, data)))
    assert len(seen) == 2
    assert seen[-1] > max(before, 0.5)
    assert seen[-1] * digits.TEST_IMAGES == round(seen[-1] * digits.TEST_IMAGES)


def test_alone_gives_back_random_numbers_and_threads():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with digits.alone(3):
        first = torch.rand(2)
        assert torch.get_num_threads() == 1
    with digits.alone(3):
        assert torch.equal(torch.rand(2), first)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
