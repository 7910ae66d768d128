"""Training of SinSR's student: the published losses number for number, its terms on small networks, what is frozen."""

from pathlib import Path

import numpy as np
import pytest
import torch
from residual_pairs import MICRO, evaluations_of, filled, networks_of, pair, run_phase, saved, with_gradient

from onestepsr.core.config import from_mapping
from onestepsr.core.errors import UserError
from onestepsr.diffusion.residual_shift import ResidualShiftSchedule
from onestepsr.methods import resshift, sinsr
from onestepsr.methods.base import SampleRandom
from onestepsr.methods.shared.residual_shift import whole_schedule
from onestepsr.methods.sinsr import SinSRConfig, build
from onestepsr.models.generators import pad_to
from onestepsr.models.loading import load_generator, load_residual_generator
from onestepsr.models.resshift.generator import conditioned
from onestepsr.models.resshift.unet import SwinUNet
from weights_by_name import fill_by_name

GOLDEN = Path(__file__).parents[1] / "golden"
TERMS = ("distillation", "inverse", "ground_truth")


@pytest.mark.slow
@torch.no_grad()
def test_losses_equal_the_published_code():
    golden = dict(np.load(GOLDEN / "sinsr_losses.npz"))
    start = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "sinsr_one_step.npz").items()}
    network = SwinUNet().eval()
    fill_by_name(network)
    lr, schedule = pad_to(start["lr"], 64, 64), ResidualShiftSchedule()
    z_T = schedule.prior(start["z_y"], start["noise"])
    target = schedule.sample_deterministic(conditioned(network, lr), start["z_y"], z_T)
    student = sinsr.student_at_last_scale({"denoiser": network}, lr, schedule)
    z_hr = torch.from_numpy(golden["z_hr"])
    terms = sinsr.terms(student, SinSRConfig(teacher="itself"), z_T=z_T, target=target, z_0=z_hr, last_step=14)
    assert {name: value.item() for name, value in terms.items()} == {
        name: pytest.approx(float(golden[name]), rel=1e-5) for name in TERMS
    }


def test_loss_in_closed_form():
    method, batch = filled(build(SinSRConfig(teacher=MICRO, distillation_weight=2.0, inverse_weight=3.0))), pair()
    student, teacher = method.networks["denoiser"], method.frozen["teacher"]
    with torch.no_grad():
        student.out[2].weight.mul_(1.5)  # a student that has moved away from its teacher
    terms = run_phase(method, batch)

    autoencoder, lq = method.frozen["autoencoder"].autoencoder, 2 * batch["lr"] - 1
    enlarged = torch.nn.functional.interpolate(batch["lr"], scale_factor=4, mode="bicubic")
    sqrt_eta = [0.1 * 9.9 ** ((t / 3) ** 0.3) for t in range(4)]
    scale = [(1 + 4 * root**2) ** 0.5 for root in sqrt_eta]
    last, first = torch.tensor([3, 3]), torch.tensor([0, 0])
    with torch.no_grad():
        z_0, z_y = (autoencoder.encode(2 * image - 1) for image in (batch["hr"], enlarged))
        z = z_T = z_y + 2 * 0.99 * SampleRandom("test", 0, samples=range(2)).normal(z_0)
        for t in (3, 2, 1):
            estimate, eta, before = teacher(z / scale[t], torch.tensor([t, t]), lq), sqrt_eta[t], sqrt_eta[t - 1]
            m, j = before / eta, before**2 - before * eta
            z = (1 - j - m) * estimate + m * z + j * z_y
        target = teacher(z / scale[0], first, lq)
        errors = {
            "distillation": 2 * (student(z_T / scale[3], last, lq) - target),
            "inverse": 3 * (student(target / scale[3], first, lq) - z_T),
            "ground_truth": student(student(z_0 / scale[3], first, lq) / scale[3], last, lq) - z_0,
        }
    weights = {"distillation": 2, "inverse": 3, "ground_truth": 1}
    expected = {name: (error / weights[name]).square().mean().item() * weights[name] for name, error in errors.items()}
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=1e-4)


def test_student_learns_and_teacher_does_not():
    method = filled(build(SinSRConfig(teacher=MICRO)))
    frozen = {name: method.frozen[name] for name in ("teacher", "autoencoder")}
    before = {name: {k: v.clone() for k, v in network.state_dict().items()} for name, network in frozen.items()}
    run_phase(method, pair())
    student = method.networks["denoiser"]
    assert with_gradient(student) == {name for name, _ in student.named_parameters()}
    for name, network in frozen.items():
        assert not any(module.training for module in network.modules())
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
        assert all(torch.equal(value, before[name][key]) for key, value in network.state_dict().items())


def test_gradient_checkpointing_changes_no_gradient_of_the_student():
    """Three of its four evaluations have a gradient: not the one that assigns a start to the real latent."""
    gradients, evaluated = [], []
    for again in (False, True):
        method = filled(build(SinSRConfig(teacher=MICRO, gradient_checkpointing=again)))
        counts = [evaluations_of(network) for network in (method.networks["denoiser"], method.frozen["teacher"])]
        run_phase(method, pair())
        gradients.append({name: p.grad for name, p in method.networks["denoiser"].named_parameters()})
        evaluated.append([len(count) for count in counts])
    assert evaluated == [[4, 4], [4 + 3, 4]]
    assert all(torch.allclose(value, gradients[1][name], atol=1e-6) for name, value in gradients[0].items())


def test_defaults_are_the_published_ones():
    config = SinSRConfig(teacher=MICRO)
    assert [getattr(config, f"{name}_weight") for name in TERMS] == [1.0, 1.0, 1.0]
    assert (config.published_slips, config.gradient_checkpointing, config.teacher_steps) == (False, False, None)
    method = build(config)
    assert (method.scale, method.hr_multiple) == (4, 64), "latents of 16 x 16 positions, 4 pixels each"


def test_student_starts_as_a_copy_that_shares_nothing():
    method = build(SinSRConfig(teacher=MICRO))
    student, teacher = method.networks["denoiser"], method.frozen["teacher"]
    assert all(p.requires_grad for p in student.parameters())
    for (name, mine), theirs in zip(student.named_parameters(), teacher.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert mine.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("left_out", TERMS)
def test_a_term_of_weight_zero_is_not_computed(left_out):
    method = build(SinSRConfig(teacher=MICRO, **{f"{left_out}_weight": 0.0}))
    evaluations = []
    method.networks["denoiser"].register_forward_pre_hook(lambda *_: evaluations.append(1))
    assert set(run_phase(method, pair())) == set(TERMS) - {left_out}
    assert len(evaluations) == {"distillation": 3, "inverse": 3, "ground_truth": 2}[left_out]


@pytest.mark.parametrize(("steps", "told"), [(None, [3, 2, 1, 0]), (2, [3, 0]), (1, [3])])
def test_teacher_takes_the_steps_it_is_given(steps, told):
    method, seen = build(SinSRConfig(teacher=MICRO, teacher_steps=steps)), []
    method.frozen["teacher"].register_forward_pre_hook(lambda module, inputs: seen.append(int(inputs[1][0])))
    run_phase(method, pair())
    assert seen == told


def test_preview_and_export_take_one_step(tmp_path):
    method = filled(build(SinSRConfig(teacher=MICRO)))
    with torch.no_grad():
        columns = method.preview(networks_of(method), pair())
        loaded = load_generator(saved(method, tmp_path / "student.safetensors"))
        sr = loaded(pair()["lr"]).clamp(0, 1)
    assert (loaded.schedule.timesteps.tolist(), loaded.sampler) == ([3], "deterministic")
    assert list(columns) == ["LR (bicubic)", "SR", "HR"]
    assert torch.allclose(sr, columns["SR"], atol=1e-4)


def test_a_student_of_its_own_and_a_teacher_that_runs_fewer_steps(tmp_path):
    one_step = build(SinSRConfig(teacher=MICRO))
    path = saved(filled(one_step), tmp_path / "student.safetensors")
    method = build(SinSRConfig(teacher=MICRO, student=str(path)))
    student, teacher = (network.state_dict() for network in (method.networks["denoiser"], method.frozen["teacher"]))
    assert not torch.equal(student["out.2.weight"], teacher["out.2.weight"])
    assert torch.equal(student["out.2.weight"], load_residual_generator(path).unet.state_dict()["out.2.weight"])
    again, seen = build(SinSRConfig(teacher=str(path))), []
    again.frozen["teacher"].register_forward_pre_hook(lambda module, inputs: seen.append(int(inputs[1][0])))
    run_phase(again, pair())
    assert seen == [3, 2, 1, 0], "the schedule it was trained with, not the one step it runs"


def test_what_does_not_fit_is_one_line(tmp_path):
    other = resshift.build(resshift.ResShiftConfig(model="random:resshift-tiny"))
    tiny = saved(other, tmp_path / "tiny.safetensors")
    cases = {
        r"latents of one shape, but random:resshift-micro has 3 channels, .* has 20 channels": {"student": str(tiny)},
        "config.teacher_steps: 5 steps: this schedule has 4, accepted: 1 to 4": {"teacher_steps": 5},
        "weights must not be negative": {"inverse_weight": -1.0},
        "nothing makes images": {"distillation_weight": 0.0, "ground_truth_weight": 0.0},
        "expected a model of the ResShift family": {"teacher": "d3sr-tiny"},
    }
    for said, values in cases.items():
        with pytest.raises(UserError, match=said) as caught:
            build(from_mapping(SinSRConfig, {"teacher": MICRO, **values}, "config"))
        assert "\n" not in str(caught.value)


def test_the_published_cap_changes_the_schedule_of_faces_alone():
    face, photos = (load_residual_generator(f"random:{name}") for name in (MICRO.partition(":")[2], "resshift-tiny"))
    assert whole_schedule(face).sqrt_eta[0].item() == pytest.approx(0.1)
    expected = [0.0316, 0.3764, 0.6673, 0.99]
    assert whole_schedule(face, capped=True).sqrt_eta.tolist() == pytest.approx(expected, abs=5e-5)
    assert torch.equal(whole_schedule(photos, capped=True).sqrt_eta, whole_schedule(photos).sqrt_eta)
    losses = [
        run_phase(filled(build(SinSRConfig(teacher=MICRO, published_slips=slips))), pair()) for slips in (False, True)
    ]
    assert losses[0]["distillation"] != losses[1]["distillation"]
    assert torch.equal(losses[0]["ground_truth"], losses[1]["ground_truth"]), "the last step alone decides it"
