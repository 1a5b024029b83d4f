"""Every step has one shape, survey -> combine -> move, on tensors and numbers alone; this package holds the steps.

Six concepts, and no others, stand between a gradient and a constrained weight:

==============  ======================================================================  ===============================
concept         what it is                                                              owner
==============  ======================================================================  ===============================
**Constraint**  units (a partition of the weights of one or several parameters), the    ``symopt/constraints``
                retraction that moves them, the penalty; frozen and stateless
**Binding**     one constraint and the parameters that it binds                         ``symopt/optim/binding.py``
**Direction**   what an optimizer makes of a gradient: a *lead* per weight, a *scale*   ``symopt/optim/<name>.py``
                per unit, and the table of its moments
**Budget**      how many units live: the ramp, the selection, the commit, and the       ``symopt/budgets``
                numbers of it that a kernel reads
**Backend**     the pairs of a direction and a retraction that it can step; what it     ``backend.py``
                does not list, the reference steps
**Step**        survey -> combine -> move                                               ``reference``, ``native``,
                                                                                        ``triton``
==============  ======================================================================  ===============================

- *survey*, per parameter: advance the first moment; per unit, sum ``g**2``, ``lead**2``, ``lead w`` and ``w**2``;
- *combine*, per unit: add the sums of all parameters of the binding (and, where they are divided among processes, of
  all processes); advance the second moment; decide the step from the sums;
- *move*, per parameter: apply it.

**A single weight.**  ``{"fc.weight": Sparse()}`` under AdamW: every weight is its own unit, so there is nothing to sum.
The direction gives ``update = scale * lead`` and ``gain = 1``; the retraction is
:func:`~symopt_kernels.reference.elementwise.sparse` with ``delta = lr * update`` and ``decay = lr * strength * gain``:

>>> import torch
>>> from symopt_kernels.reference.elementwise import sparse
>>> w, update, scale = torch.tensor([1.0, 1e-7]), torch.tensor([0.5, 0.0]), torch.tensor(1.0)
>>> sparse(w, 0.01 * update, 0.01 * 0.1, torch.tensor(0.0), scale)  # one moves, one is attracted and snaps to zero
tensor([0.9940, 0.0000])

**A channel that two layers write.**  ``GroupSparse({"conv.weight": (0, None), "norm.weight": (0, None)})`` has one unit
per channel, over both parameters.  Their sums are added in *combine*, which decides once per channel:

>>> from symopt_kernels.reference import units as step
>>> from symopt_kernels.units import Part, Units
>>> units = Units(2, (Part((2, 3), 0, torch.arange(2)), Part((2,), 0, torch.arange(2))))
>>> weights, grads = [torch.ones(2, 3), torch.ones(2)], [torch.zeros(2, 3), torch.zeros(2)]
>>> sums = step.survey(units, grads, grads, weights)
>>> sums[3]  # w**2 of each channel: three weights of the convolution and the scale
tensor([4., 4.])
>>> shrink, shift, size = step.combine(sums, 0.01, 0.1, torch.tensor(0.0), torch.tensor(1.0))
>>> step.move(units, units.parts[1], weights[1], grads[1], shrink, shift)
tensor([0.9506, 0.9506])

**A plane.**  ``{("enc.weight", "dec.weight"): Tied()}`` has one unit, what is off the plane of equal weights; the part
on the plane takes the plain step, and :func:`~symopt_kernels.reference.plane.plane_step` moves the rest by one gate:

>>> from symopt_kernels.groups import Groups
>>> from symopt_kernels.reference.plane import plane_step
>>> w, mean, zero = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]), torch.zeros(2)
>>> plane_step(w, mean, zero, zero, 0.1, torch.tensor(0.0), torch.tensor(1.0), Groups(1, (2,), (0,)))
tensor([1.0695, 2.9305])

``reference`` is the readable definition of every step; ``native`` (C++ on CPUs) and ``triton`` (GPUs) are tested
against it.
"""
