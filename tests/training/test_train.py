import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.training.data import TokenData
from jaxinfer.training.train import Recipe, token_losses, train

token_losses_jit = jax.jit(token_losses, static_argnums=0)


def losses(model, params, tokens_BS):
    with jax.set_mesh(model.mesh):
        return np.asarray(token_losses_jit(model, params, np.asarray(tokens_BS, np.int32)))


def test_losses_are_those_of_each_row_and_of_what_came_before(sizes, make_model, random_params):
    model = make_model()
    params = random_params(model)
    tokens_BS = np.random.default_rng(0).integers(0, sizes["vocab_size"], (3, 11))
    whole = losses(model, params, tokens_BS)
    assert whole.shape == (3, 10)
    others = tokens_BS[[2, 1, 0]]
    # float32 at highest precision: sums of at most 48 terms of order 1
    np.testing.assert_allclose(losses(model, params, others), whole[[2, 1, 0]], atol=1e-5)
    others[[0, 2]] = tokens_BS[1]
    np.testing.assert_allclose(losses(model, params, others)[1], whole[1], atol=1e-5)
    changed = tokens_BS.copy()
    changed[:, 6] = (changed[:, 6] + 1) % sizes["vocab_size"]
    after = losses(model, params, changed)
    np.testing.assert_allclose(after[:, :5], whole[:, :5], atol=1e-5)
    assert (np.abs(after[:, 5:] - whole[:, 5:]) > 1e-3).any(axis=0).all()


def test_random_weights_know_nothing_and_no_token_is_free(sizes, make_model, random_params):
    model = make_model()
    tokens_BS = np.random.default_rng(0).integers(0, sizes["vocab_size"], (3, 11))
    values = losses(model, random_params(model), tokens_BS)
    assert values.min() > 0.0
    assert values.mean() >= 0.9 * np.log(sizes["vocab_size"])


def test_gradients_on_two_devices_are_those_on_one(sizes, make_model, random_params):
    tokens_BS = np.random.default_rng(0).integers(0, sizes["vocab_size"], (2, 9))
    results = []
    for tensor in (1, 2):
        model = make_model(tensor=tensor)
        params = random_params(model)
        with jax.set_mesh(model.mesh):
            mean = jax.jit(jax.grad(lambda p, m=model: token_losses(m, p, jnp.asarray(tokens_BS, jnp.int32)).mean()))
            results.append([np.asarray(gradient) for gradient in mean(params)])
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5)


def repeating(num_tokens):
    """A text of period 7: learnt by heart its loss is 0, guessed by frequency it is log 7."""
    return (np.arange(num_tokens) % 7).astype(np.uint16)


RECIPE = Recipe(steps=60, batch=4, row=12, learning_rate=1e-2, warmup=0.1, report=20)
DATA = TokenData(repeating(400), repeating(60), held_out_bytes=30)


@pytest.fixture(scope="module")
def trained(compiled_once, make_model, random_params):
    """The model, its weights after training, the reports that came back, and those that were watched."""
    model, watched = make_model(), []
    params, reports = train(model, random_params(model), DATA, RECIPE, watched.append)
    return model, params, reports, watched


def test_training_learns_what_repeats_and_reports_it(trained):
    model, params, reports, watched = trained
    assert watched == reports
    assert [report.step for report in reports] == [20, 40, 60]
    assert [report.tokens for report in reports] == [20 * 48, 40 * 48, 60 * 48]
    assert reports[0].held_out_loss > reports[-1].held_out_loss
    assert reports[-1].held_out_loss < 0.5 * np.log(7)
    assert reports[-1].loss < reports[0].loss
    # two tokens a byte's worth: 59 predictions over 30 bytes
    np.testing.assert_allclose(reports[-1].held_out_per_byte, reports[-1].held_out_loss * 59 / 30)
    np.testing.assert_allclose(reports[0].learning_rate, 1e-2, rtol=0.3)
    assert all(param.dtype == jnp.float32 for param in params)
    # The reported loss is the mean over the held-out text, in the checkpoint's bfloat16.
    stored = [param.astype(jnp.bfloat16) for param in params]
    rows_BS = np.lib.stride_tricks.sliding_window_view(repeating(61), 13)[::12]  # the last token is beyond the text
    values = losses(model, stored, rows_BS).reshape(-1)[:-1]
    np.testing.assert_allclose(values.sum() / 59, reports[-1].held_out_loss, rtol=0.02)


def test_training_repeats_with_its_seed(trained, random_params):
    model, params, reports, _ = trained
    again, reports_again = train(model, random_params(model), DATA, RECIPE, lambda _: None)
    assert all(np.array_equal(one, other) for one, other in zip(params, again, strict=True))
    assert [report.loss for report in reports_again] == [report.loss for report in reports]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"warmup": 1.0}, r"warmup is 1\.0"),
        ({"report": 0}, "report"),
    ],
)
def test_a_recipe_out_of_range_names_its_field(changes, field):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(RECIPE, **changes)


def test_a_row_longer_than_the_context_is_refused(make_model):
    with pytest.raises(ValueError, match=r"row is 17; .* context, 16"):
        train(make_model(), [], DATA, dataclasses.replace(RECIPE, row=17), lambda _: None)
