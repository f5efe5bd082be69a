"""The moving average of the weights, held to its recursion."""

import torch

from tests.engines import tiny_model
from trainer.weight_average import WeightAverage


def changed(model, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


def test_the_average_is_its_recursion_weights_and_statistics():
    model = tiny_model()
    average = WeightAverage(model, decay=0.3)
    expected = None
    for step in range(6):
        changed(model, step)
        average.update(model)
        now = {name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        if expected is None:
            expected = now  # the first weights are taken as they are
        else:
            decay = min(0.3, (1 + step) / (10 + step))
            expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
    assert average.updates == 6
    state = average.model.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name].double(), tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert any("running_mean" in name for name in expected)
    assert not any(p.requires_grad for p in average.model.parameters())


def test_it_goes_on_from_saved_weights():
    model = tiny_model()
    average, again = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    for step in range(3):
        changed(model, step)
        average.update(model)
    again.load({name: tensor.clone() for name, tensor in average.model.state_dict().items()}, average.updates)
    changed(model, 3)
    for each in (average, again):
        each.update(model)
    assert again.updates == 4
    for name, tensor in average.model.state_dict().items():
        assert again.model.state_dict()[name].equal(tensor), name
