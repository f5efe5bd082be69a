"""Heads against formulas written out, and logit adjustment against a Bayes rule that is known."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from cluster.errors import UserError
from trainer.closed_forms import fit_temperature, log_prior, logit_adjustment, nearest_class_mean, tau_norm
from trainer.heads import Head, HeadSpec, load_heads, parse_heads, save_heads
from trainer.stage_two import train_heads

NUM_CLASSES, DIM = 4, 6


@pytest.fixture
def own():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(NUM_CLASSES, DIM, generator=rng, dtype=torch.float64) * torch.tensor(
        [[4.0], [2.0], [1.0], [0.5]]
    )
    return Head(weight, torch.randn(NUM_CLASSES, generator=rng, dtype=torch.float64))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_tau_norm_divides_each_weight_by_a_power_of_its_length_and_drops_the_bias(own, tau):
    head = tau_norm(own, tau)
    for c in range(NUM_CLASSES):
        length = sum(float(w) ** 2 for w in own.weight[c]) ** 0.5
        for d in range(DIM):
            assert float(head.weight[c, d]) == pytest.approx(float(own.weight[c, d]) / length**tau, rel=1e-12)
    assert not head.bias.any()


def test_tau_norm_leaves_a_zero_weight_at_zero(own):
    own.weight[2] = 0
    assert torch.equal(tau_norm(own, 1.0).weight[2], torch.zeros(DIM, dtype=torch.float64))


def test_nearest_class_mean_is_sklearn_s(own):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, DIM)) + 3
    labels = np.arange(200) % NUM_CLASSES
    means = torch.from_numpy(np.stack([x[labels == c].mean(axis=0) for c in range(NUM_CLASSES)]))
    predicted = nearest_class_mean(means, normalise=False).logits(torch.from_numpy(x)).argmax(dim=1).numpy()
    assert np.array_equal(predicted, NearestCentroid().fit(x, labels).predict(x))


def test_cosine_class_mean_is_the_cosine_to_the_mean():
    rng = np.random.default_rng(2)
    x, means = rng.normal(size=(30, DIM)), rng.normal(size=(NUM_CLASSES, DIM))
    logits = nearest_class_mean(torch.from_numpy(means), normalise=True).logits(torch.from_numpy(x)).numpy()
    for n in range(len(x)):
        for c in range(NUM_CLASSES):
            cosine = x[n] @ means[c] / (np.linalg.norm(x[n]) * np.linalg.norm(means[c]))
            assert logits[n, c] == pytest.approx(cosine, abs=1e-12)


class TestLogitAdjustmentOnAMixture:
    """Three unit Gaussians on a line, priors 90 : 9 : 1. log p(x|y) + log pi_y is linear in x (up to a common term)."""

    means = np.array([0.0, 1.5, 3.0])
    counts = np.array([9000, 900, 100])

    def plain(self) -> Head:
        """The classifier that cross-entropy would find: Bayes' rule under the training prior."""
        bias = -0.5 * self.means**2 + np.log(self.counts / self.counts.sum())
        return Head(torch.from_numpy(self.means)[:, None], torch.from_numpy(bias))

    def balanced_error(self, head: Head) -> float:
        """Exact, by integrating each class's density on a fine grid."""
        x = torch.linspace(-8, 12, 200_001, dtype=torch.float64)
        predicted = head.logits(x[:, None]).argmax(dim=1).numpy()
        density = np.exp(-0.5 * (x.numpy()[:, None] - self.means) ** 2) / np.sqrt(2 * np.pi)
        step = float(x[1] - x[0])
        return 1 - float(np.mean([density[predicted == c, c].sum() * step for c in range(3)]))

    def test_tau_one_is_the_balanced_bayes_rule(self):
        # Equal priors: the nearest mean, cut at .75 and 2.25. Its error: two outer tails and both sides in the middle.
        tail = 0.2266273523768682  # P(Z > .75)
        bayes = (tail + 2 * tail + tail) / 3
        assert self.balanced_error(logit_adjustment(self.plain(), self.counts, 1.0)) == pytest.approx(bayes, abs=1e-4)

    def test_no_other_tau_is_better(self):
        best = self.balanced_error(logit_adjustment(self.plain(), self.counts, 1.0))
        for tau in (0.0, 0.5, 0.8, 0.95, 1.05, 1.2, 2.0):
            assert self.balanced_error(logit_adjustment(self.plain(), self.counts, tau)) > best

    def test_the_wrong_sign_is_worse_than_doing_nothing(self):
        nothing = self.balanced_error(self.plain())
        assert self.balanced_error(logit_adjustment(self.plain(), self.counts, -1.0)) > nothing + 0.01
        assert self.balanced_error(logit_adjustment(self.plain(), self.counts, 1.0)) < nothing - 0.1

    @pytest.fixture(scope="class")
    def trained(self):
        """By tau, the balanced error of a logit-adjusted loss on samples of the mixture; None = plain cross-entropy."""
        labels = np.repeat(np.arange(3), self.counts)
        x = self.means[labels] + np.random.default_rng(0).normal(size=len(labels))
        settings = {"lr": 5.0, "epochs": 15, "weight_decay": 0.0}
        specs = [HeadSpec("logit_adjusted", tau=tau, **settings) for tau in (1.0, -1.0)]
        specs += [HeadSpec("balanced_softmax", **settings), HeadSpec("crt", power=1.0, **settings)]
        nothing = Head(torch.zeros(3, 1), torch.zeros(3))
        heads = train_heads(specs, x[:, None].astype(np.float32), labels, self.counts, nothing)
        errors = [self.balanced_error(Head(head.weight.double(), head.bias.double())) for head in heads]
        return dict(zip((1.0, -1.0, "balanced softmax", None), errors, strict=True))

    def test_a_loss_that_is_adjusted_learns_the_balanced_bayes_rule(self, trained):
        assert trained[1.0] == pytest.approx(self.balanced_error(self.balanced()), abs=0.01)
        assert trained["balanced softmax"] == pytest.approx(trained[1.0], abs=1e-6)
        assert trained[None] == pytest.approx(self.balanced_error(self.plain()), abs=0.04)  # 100 of the rarest

    def test_the_loss_s_wrong_sign_is_worse_than_doing_nothing(self, trained):
        assert trained[-1.0] > trained[None] + 0.05 and trained[1.0] < trained[None] - 0.1

    def balanced(self) -> Head:
        """Bayes' rule under equal priors."""
        return Head(torch.from_numpy(self.means)[:, None], torch.from_numpy(-0.5 * self.means**2))

    def test_tau_zero_is_the_classifier_itself(self):
        head = logit_adjustment(self.plain(), self.counts, 0.0)
        assert torch.equal(head.weight, self.plain().weight) and torch.equal(head.bias, self.plain().bias)


def test_a_class_without_samples_has_no_prior():
    with pytest.raises(
        UserError, match="class 1 has no training sample, and stage two needs at least one of every class"
    ):
        log_prior(np.array([5, 0, 3]))


def test_unknown_family_is_named():
    with pytest.raises(UserError, match="head family 'tau' is not known; known: balanced_softmax, cosine, crt"):
        HeadSpec("tau")


@pytest.mark.parametrize("family", ["balanced_softmax", "logit_adjusted", "reweighted", "ldam_drw"])
def test_correcting_twice_is_refused_unless_asked_for(family):
    message = f"head family {family} already corrects for the class frequencies, and sampling with power = 0.5 would"
    with pytest.raises(UserError, match=message):
        HeadSpec(family, power=0.5)
    twice = HeadSpec(family, power=0.5, double_correction=True)
    assert twice.sampling_power == 0.5 and twice.knobs()["power"] == 0.5


def test_knobs_are_those_that_the_family_reads():
    assert HeadSpec("tau_norm", tau=0.4).knobs() == {"tau": 0.4}
    assert list(HeadSpec("crt").knobs()) == ["power", "lr", "weight_decay", "epochs", "batch_size", "seed"]
    assert HeadSpec("balanced_softmax").sampling_power == 1.0
    assert HeadSpec("crt", power=0.3).sampling_power == 0.3


def _nll(logits, labels, temperature):
    return float(torch.nn.functional.cross_entropy(logits / temperature, labels))


@pytest.mark.parametrize("true_temperature", [0.3, 1.0, 7.0])
def test_temperature_minimises_the_nll(true_temperature):
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(500, NUM_CLASSES, generator=rng, dtype=torch.float64) * 2
    labels = torch.multinomial((logits / true_temperature).softmax(dim=1), 1, generator=rng)[:, 0]
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(true_temperature, rel=0.5)
    grid = np.geomspace(fitted / 3, fitted * 3, 2001)  # its middle is the fitted one
    best = grid[np.argmin([_nll(logits, labels, t) for t in grid])]
    assert best == pytest.approx(fitted, rel=2e-3)


def test_temperature_does_not_depend_on_how_many_rows_are_looked_at_at_once(monkeypatch):
    rng = torch.Generator().manual_seed(4)
    logits, labels = torch.randn(100, NUM_CLASSES, generator=rng), torch.randint(0, NUM_CLASSES, (100,), generator=rng)
    whole = fit_temperature(logits, labels)
    monkeypatch.setattr("trainer.closed_forms._CHUNK_BYTES", 8 * NUM_CLASSES * 7)
    assert fit_temperature(logits, labels) == pytest.approx(whole, rel=1e-9)


def test_temperature_stays_within_its_bounds():
    logits = torch.eye(3, dtype=torch.float64)
    assert fit_temperature(logits, torch.arange(3)) == pytest.approx(0.01, rel=1e-6)
    assert fit_temperature(logits, torch.tensor([1, 2, 0])) == pytest.approx(1e4, rel=1e-6)


def test_heads_survive_the_file(own, tmp_path):
    path = tmp_path / "heads.safetensors"
    cosine = nearest_class_mean(own.weight, normalise=True)
    path.write_bytes(save_heads({"own": own, "ncm": cosine}, {"winner": "ncm"}))
    heads = load_heads(path)
    assert torch.equal(heads["own"].weight, own.weight) and torch.equal(heads["own"].bias, own.bias)
    assert heads["ncm"].normalise and not heads["own"].normalise
    assert parse_heads(path.read_bytes())[1]["winner"] == "ncm"


def test_missing_or_damaged_heads_are_named(own, tmp_path):
    path = tmp_path / "heads.safetensors"
    with pytest.raises(UserError, match=r"heads .*heads.safetensors do not exist; run `rarelens stage-two` first"):
        load_heads(path)
    path.write_bytes(save_heads({"own": own})[:-8])
    with pytest.raises(UserError, match=r"heads .*heads.safetensors cannot be read"):
        load_heads(path)


def test_logits_take_float16_features(own):
    head = Head(own.weight.float(), own.bias.float())
    x = torch.randn(5, DIM).half()
    assert torch.allclose(head.logits(x), x.float() @ head.weight.T + head.bias)
