"""Trainings of all kinds, each a few iterations long; which one is told on the command line.

python semantics.py KIND WEIGHTS_FILE
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

STEPS = 12


@dataclass
class Training:
    """A training that is ready to run.

    Attributes:
        model: what is trained.
        optimizers: what a user would call its optimizers.
        iterate: generator function: runs one iteration, and yields whether it moved the weights.
    """

    model: nn.Module
    optimizers: list[Any]
    iterate: Any


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def batch(number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 4, generator=generator)
    return x, x.prod(1, keepdim=True)


def loss_of(model, number):
    x, y = batch(number)
    return nn.functional.mse_loss(model(x), y)


def simple(model, optimizer, step=None):
    """The plain loop."""
    for number in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        (step or optimizer.step)()
        yield True


def plain():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return Training(model, [optimizer], lambda: simple(model, optimizer))


def accumulation():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def iterate():
        for number in range(STEPS):
            for micro in range(4):
                (loss_of(model, 4 * number + micro) / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield True

    return Training(model, [optimizer], iterate)


def closure():
    """L-BFGS evaluates its closure many times in a step."""
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def iterate():
        for number in range(STEPS):

            def evaluate(number=number):
                optimizer.zero_grad()
                loss = loss_of(model, number)
                loss.backward()
                return loss

            optimizer.step(evaluate)
            yield True

    return Training(model, [optimizer], iterate)


class Decayed(torch.optim.SGD):
    """Its step is another's step, and then something more."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.999)
        return loss


def super_step():
    model = Net()
    optimizer = Decayed(model.parameters(), lr=0.05, momentum=0.9)
    return Training(model, [optimizer], lambda: simple(model, optimizer))


class Lookahead(torch.optim.Optimizer):
    """Slow weights follow those of the inner optimizer every few steps."""

    def __init__(self, inner, every=3, alpha=0.5):
        super().__init__(inner.param_groups, {})
        self.inner, self.every, self.alpha = inner, every, alpha
        self.param_groups = inner.param_groups
        self.count = 0
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % self.every == 0:
            parameters = [p for g in self.param_groups for p in g["params"]]
            for slow, fast in zip(self.slow, parameters, strict=True):
                slow.lerp_(fast, self.alpha)
                fast.copy_(slow)
        return loss


def lookahead():
    model = Net()
    optimizer = Lookahead(torch.optim.Adam(model.parameters(), lr=0.05))
    return Training(model, [optimizer], lambda: simple(model, optimizer))


def lookahead_inner():
    """As above, and the user names the inner optimizer."""
    training = lookahead()
    training.optimizers = [training.optimizers[0].inner]
    return training


def accelerated():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)

    def iterate():
        for number in range(2 * STEPS):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, number))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                yield True

    return Training(model, [optimizer], iterate)


def compiled_step():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.05), capturable=False)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    return Training(model, [optimizer], lambda: simple(model, optimizer, step))


def compiled_model():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    compiled = torch.compile(model, backend="eager")
    return Training(compiled, [optimizer], lambda: simple(compiled, optimizer))


def in_backward():
    """One optimizer for each parameter, which steps as soon as the gradient is there."""
    model = Net()
    optimizers = {p: torch.optim.Adam([p], lr=0.05) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)

    def iterate():
        for number in range(STEPS):
            loss_of(model, number).backward()
            yield True

    return Training(model, list(optimizers.values()), iterate)


def schedule_free():
    import schedulefree

    model = Net()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05, warmup_steps=3)
    optimizer.train()

    def iterate():
        for moved in simple(model, optimizer):
            yield moved
            optimizer.eval()
            with torch.no_grad():
                loss_of(model, 100)
            optimizer.train()

    return Training(model, [optimizer], iterate)


def _scaled(optimizer_of):
    model = Net()
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def iterate():
        for number in range(STEPS + 3):
            broken = number in (0, 4, 9)
            optimizer.zero_grad()
            loss = loss_of(model, number) * (float("inf") if broken else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            yield not broken

    return Training(model, [optimizer], iterate)


def scaler_unfused():
    return _scaled(lambda model: torch.optim.Adam(model.parameters(), lr=0.05))


def scaler_fused():
    return _scaled(lambda model: torch.optim.Adam(model.parameters(), lr=0.05, fused=True))


def two_optimizers():
    model = Net()
    optimizers = [
        torch.optim.SGD(model.first.parameters(), lr=0.05, momentum=0.9),
        torch.optim.AdamW(model.second.parameters(), lr=0.05),
    ]

    def iterate():
        for number in range(STEPS):
            model.zero_grad()
            loss_of(model, number).backward()
            for optimizer in optimizers:
                optimizer.step()
            yield True

    return Training(model, optimizers, iterate)


class Generator(Net):
    pass


class Discriminator(Net):
    pass


def two_models():
    """The first one is what the test looks at."""
    generator, discriminator = Generator(), Discriminator(5)
    first = torch.optim.Adam(generator.parameters(), lr=0.05)
    second = torch.optim.Adam(discriminator.parameters(), lr=0.05)

    def iterate():
        for number in range(STEPS):
            for model, optimizer in ((generator, first), (discriminator, second)):
                optimizer.zero_grad()
                loss_of(model, number).backward()
                optimizer.step()
            yield True

    return Training(generator, [first], iterate)


def group_added():
    """The first layer joins training in the middle; it could be trained from the start."""
    model = Net()
    optimizer = torch.optim.Adam(model.second.parameters(), lr=0.05)

    def iterate():
        for number, moved in enumerate(simple(model, optimizer), 1):
            yield moved
            if number == STEPS // 2:
                optimizer.add_param_group({"params": list(model.first.parameters())})

    return Training(model, [optimizer], iterate)


def unfrozen():
    """As above, and it was frozen before."""
    training = group_added()
    model, iterate = training.model, training.iterate
    model.first.requires_grad_(False)

    def unfreeze():
        for number, moved in enumerate(iterate(), 1):
            yield moved
            if number == STEPS // 2:
                model.first.requires_grad_(True)

    return Training(model, training.optimizers, unfreeze)


def assigned():
    """New parameter objects, and a new optimizer for them, in the middle."""
    model = Net()
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.05)]

    def iterate():
        for number in range(STEPS):
            if number == STEPS // 2:
                state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                model.load_state_dict(state, assign=True)
                optimizers.append(torch.optim.Adam(model.parameters(), lr=0.02))
            optimizers[-1].zero_grad()
            loss_of(model, number).backward()
            optimizers[-1].step()
            yield True

    return Training(model, optimizers[:1], iterate)


def moved_to_double():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def iterate():
        for number in range(STEPS):
            if number == STEPS // 2:
                model.double()
            optimizer.zero_grad()
            x, y = (each.to(model.first.weight.dtype) for each in batch(number))
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            yield True

    return Training(model, [optimizer], iterate)


def layer_removed():
    """The tracker cannot follow this one."""
    model = Net()
    model.extra = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def iterate():
        for number, moved in enumerate(simple(model, optimizer), 1):
            yield moved
            if number == STEPS // 2:
                del model.extra

    return Training(model, [optimizer], iterate)


def layer_widened():
    """Nor this one."""
    model = Net()
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.05)]

    def iterate():
        for number in range(STEPS):
            if number == STEPS // 2:
                model.first, model.second = nn.Linear(4, 9), nn.Linear(9, 1)
                optimizers.append(torch.optim.Adam(model.parameters(), lr=0.05))
            optimizers[-1].zero_grad()
            loss_of(model, number).backward()
            optimizers[-1].step()
            yield True

    return Training(model, optimizers[:1], iterate)


def step_raises():
    """A step that fails on the way, and is tried again."""
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def iterate():
        for number in range(STEPS):

            def evaluate(number=number):
                optimizer.zero_grad()
                loss = loss_of(model, number)
                loss.backward()
                return loss

            def broken():
                raise FloatingPointError("the loss is not finite")

            try:
                optimizer.step(broken)
            except FloatingPointError:
                optimizer.step(evaluate)
            yield True

    return Training(model, [optimizer], iterate)


KINDS = {
    function.__name__: function
    for function in (
        plain,
        accumulation,
        closure,
        super_step,
        lookahead,
        lookahead_inner,
        accelerated,
        compiled_step,
        compiled_model,
        in_backward,
        schedule_free,
        scaler_unfused,
        scaler_fused,
        two_optimizers,
        two_models,
        group_added,
        unfrozen,
        assigned,
        moved_to_double,
        layer_removed,
        layer_widened,
        step_raises,
    )
}


def bare(model):
    return getattr(model, "_orig_mod", model)


def weights_of(model):
    return {name: t.detach().clone() for name, t in bare(model).state_dict().items()}


def main():
    kind, path = sys.argv[1:]
    torch.manual_seed(0)
    training = KINDS[kind]()
    history = [weights_of(training.model) for moved in training.iterate() if moved]
    torch.save(history, path)
    print(f"{len(history)} iterations")


if __name__ == "__main__":
    main()
