"""The lander after the step that Gymnasium's reset takes, without taking it.

The hull gets a push of up to 1000 N in x and in y for one step, while the joints pull the legs into
place, 0.63 m away. The velocities after it are an affine function of the forces, the poses nearly
one: so they come from the table below, and an automatic reset costs no second solve. Fitted to
`_lander_world.full_step` (4,000 pushes of up to 1,100 N, torques of up to 3 N m, float64 least
squares; greatest error 5e-6 m/s, 2e-6 m; of a leg's rate 1.5e-5 rad/s; `test_lander_world` checks
it). Units as in `_rigid_body`, forces in kN.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ._lander_world import FAT, World, grow_boxes, leg_boxes, no_pairs
from ._rigid_body import (
    ANCHOR_X,
    DT,
    HULL_CENTRE,
    REFERENCE,
    SIDE,
    JointImpulse,
    Pose,
    Velocity,
)

WIDTH, HEIGHT = 20.0, 40.0 / 3.0  # [m] of the scene

# rows: x, y, turn of hull, leg 0, leg 1; columns: 1, Fx [kN], Fy [kN], torque [N m]
_VELOCITY = np.array(
    [
        [0.0, 4.042799, 0.0, -0.0004578816],
        [0.0, 0.0, 4.033162, 0.0],
        [0.0, -0.4578772, 0.0, 0.02175418],
        [0.0, 3.706773, 0.0, 0.01550701],
        [0.0, -0.2911394, 4.033162, 0.01383231],
        [-2.439236e-06, -0.4578772, 0.0, 0.02175419],
        [0.0, 3.706773, 0.0, 0.01550701],
        [0.0, 0.2911394, 4.033162, -0.0138323],
        [3.772759e-06, -0.4578769, -3.101287e-07, 0.02175413],
    ],
    np.float32,
)
# the accumulated impulses of joint 0 and 1: x, x, y, y, torque, torque; columns as above
_IMPULSE = np.array(
    [
        [0.0, 0.2635928, 0.0, 0.00110272],
        [0.0, 0.2635928, 0.0, 0.001102721],
        [0.0, -0.02070325, 0.2868026, 0.0009836311],
        [0.0, 0.02070325, 0.2868026, -0.0009836303],
        [0.0, 0.1527567, 0.1823623, 0.001361946],
        [0.0, 0.1527567, -0.1823623, 0.001361946],
    ],
    np.float32,
)
# rows as of _VELOCITY; columns: 1, Fx, Fy, torque, Fx^2, Fx Fy, Fy^2, Fx torque
_POSE = np.array(
    [
        [10.0, 0.08076398, 0.0, -4.78591e-06, 0.0, 0.0, 0.0, 0.0],
        [13.44077, 0.0, 0.08066323, 0.0, 0.0, 0.0, 0.0, 0.0],
        [6.611514e-06, -0.00924994, 0.0, 0.0004394733, 0.0, 0.0, 0.0, 0.0],
        [10.87101, 0.07725929, 0.0, 0.0001617337, -6.927788e-05, 0.0, 0.0, 6.578863e-06],
        [13.12547, -0.01044911, 0.08066324, 0.0004964317, -7.268492e-06, 0.0, 0.0, 7.031665e-07],
        [0.4918956, -0.01199647, 0.0, 0.0005699546, -3.10847e-05, 0.0, 0.0, 2.938518e-06],
        [9.128937, 0.07726137, 0.0, 0.0001616363, 6.945453e-05, 0.0, 0.0, -6.590799e-06],
        [13.1257, 0.01045257, 0.08066321, -0.0004966028, -7.37673e-06, 0.0, 0.0, 6.955259e-07],
        [-0.4921565, -0.01200016, 0.0, 0.0005701438, 3.130746e-05, 0.0, 0.0, -2.956355e-06],
    ],
    np.float32,
)


def at_creation() -> World:
    """The world as Gymnasium builds it, before its reset takes a step."""
    zero, zeros = jnp.float32(0.0), jnp.zeros(2, jnp.float32)
    hull = Pose(jnp.float32(WIDTH / 2), jnp.float32(HEIGHT + HULL_CENTRE), zero)
    x = jnp.asarray(np.float32(WIDTH / 2) - SIDE * ANCHOR_X)
    legs = Pose(x, jnp.full(2, HEIGHT, jnp.float32), jnp.asarray(REFERENCE))
    low_x, low_y, high_x, high_y = leg_boxes(legs)
    return World(
        hull=hull,
        leg=legs,
        hull_velocity=Velocity(zero, zero, zero),
        leg_velocity=Velocity(zeros, zeros, zeros),
        joint=JointImpulse(zeros, zeros, zeros, zeros),
        pairs=no_pairs(()),
        box=jnp.stack([low_x - FAT, low_y - FAT, high_x + FAT, high_y + FAT]),
        slow_steps=jnp.int32(0),
        flag=jnp.zeros(2, bool),
        game_over=jnp.bool_(False),
        awake=jnp.bool_(True),
    )


def after_first_step(gravity: Any, force_x: Any, force_y: Any, torque: Any) -> World:
    """The world after the reset's step; gravity () [m/s^2], force () [N], torque () [N m].

    What is not exact: how much of a joint's torque is the motor's and how much the limit's, which
    is forgotten as the next step begins (to 0.01 N m s; its effect there is 5e-6 rad/s).
    """
    fx, fy = np.float32(1e-3) * force_x, np.float32(1e-3) * force_y

    def combine(rows, *terms):
        out = []
        for row in rows:
            value = jnp.float32(row[0])
            for factor, term in zip(row[1:], terms, strict=True):
                value = value + factor * term if factor else value
            out.append(value)
        return out

    v = combine(_VELOCITY, fx, fy, torque)
    p = combine(_POSE, fx, fy, torque, fx * fx, fx * fy, fy * fy, fx * torque)
    for i in (1, 4, 7):  # gravity moves all alike
        v[i] = v[i] + DT * gravity
        p[i] = p[i] + DT * DT * gravity
    x0, x1, y0, y1, turn0, turn1 = combine(_IMPULSE, fx, fy, torque)
    motor0 = jnp.minimum(np.float32(-0.0965), np.float32(0.929) * turn0 - np.float32(0.071))
    motor1 = jnp.maximum(np.float32(0.0965), np.float32(0.929) * turn1 + np.float32(0.071))
    motor = jnp.stack([motor0, motor1])
    before = at_creation()
    legs = Pose(*(jnp.stack(pair) for pair in zip(p[3:6], p[6:9], strict=True)))
    box, _ = grow_boxes(before.box, before.leg, legs)
    return before._replace(
        hull=Pose(*p[:3]),
        leg=legs,
        hull_velocity=Velocity(*v[:3]),
        leg_velocity=Velocity(*(jnp.stack(pair) for pair in zip(v[3:6], v[6:9], strict=True))),
        joint=JointImpulse(
            motor=motor,
            x=jnp.stack([x0, x1]),
            y=jnp.stack([y0, y1]),
            limit=jnp.stack([turn0, turn1]) - motor,
        ),
        box=box,
    )
