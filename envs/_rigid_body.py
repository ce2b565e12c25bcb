"""Two legs on a hull: masses, the two revolute joints, and their solvers as Box2D 2.3 has them.

Everything is written for many scenes at once. A quantity of the hull is an array (...), one of the
legs (2, ...): leg 0 is the one on the right (+x), leg 1 the one on the left; the trailing axes are
scenes, all of them alike, so that scenes lie side by side in memory and XLA works on several with
one instruction. Units: metres, seconds, radians, kilograms; positions are those of centres of mass.

The algorithm is Box2D's (Erin Catto, https://box2d.org, zlib licence): sequential impulses in the
order of Box2D's island, warm-started. See `_lander_world` for the whole step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # of jax or numpy: lanes last

DT = np.float32(1 / 50)  # [s] a step
LINEAR_SLOP = np.float32(0.005)  # [m]
ANGULAR_SLOP = np.float32(2.0 / 180.0 * np.pi)  # [rad]
MAX_ANGULAR_CORRECTION = np.float32(8.0 / 180.0 * np.pi)  # [rad] a sweep
MAX_TRANSLATION = np.float32(2.0)  # [m] a step
MAX_ROTATION = np.float32(0.5 * np.pi)  # [rad] a step
TIME_TO_SLEEP = np.float32(0.5)  # [s]
LINEAR_SLEEP = np.float32(0.01)  # [m/s]
ANGULAR_SLEEP = np.float32(2.0 / 180.0 * np.pi)  # [rad/s]

# Masses as Box2D computes them from the polygons and densities (5 for the hull, 1 for a leg).
HULL_MASS = np.float32(4.816666603)  # [kg]
HULL_CENTRE = np.float32(0.1013071910)  # [m] of mass, above the origin of the hull
HULL_INV_MASS = np.float32(0.20761246)
HULL_INV_INERTIA = np.float32(1.27570426)  # about the centre of mass
LEG_INV_MASS = np.float32(14.0624982)
LEG_INV_INERTIA = np.float32(558.36380)

# The joints: bodyA is the hull, bodyB the leg. Index 0 is the leg on the right.
SIDE = np.array([-1.0, 1.0], np.float32)  # i of Gymnasium's source
ANCHOR_X = np.float32(20 / 30)  # [m] of the leg's anchor, times SIDE, in the leg's frame
ANCHOR_Y = np.float32(18 / 30)
LOWER = np.array([0.4, -0.9], np.float32)  # [rad]
UPPER = np.array([0.9, -0.4], np.float32)
REFERENCE = np.array([-0.05, 0.05], np.float32)  # angle of the leg when the joint was made
MOTOR_SPEED = np.array([-0.3, 0.3], np.float32)  # [rad/s]
MAX_MOTOR_IMPULSE = np.float32(np.float32(40.0) * DT)  # [N m s] a step
MOTOR_MASS = np.float32(1.0) / (HULL_INV_INERTIA + LEG_INV_INERTIA)


class Velocity(NamedTuple):
    """Of one body: vx, vy [m/s] of the centre of mass, w [rad/s]; (...) each."""

    x: Array
    y: Array
    w: Array


class Pose(NamedTuple):
    """Of one body: x, y [m] of the centre of mass, a [rad]; (...) each."""

    x: Array
    y: Array
    a: Array


class JointImpulse(NamedTuple):
    """Accumulated over one step and kept for the next: motor and limit [N m s], x, y [N s]."""

    motor: Array
    x: Array
    y: Array
    limit: Array


class Joint(NamedTuple):
    """What a joint's velocity sweep needs, for one leg; (...) each.

    r: from the centre of mass to the anchor, of hull (a) and leg (b). k..: inverse of the 2x2
    matrix of the anchor; e: column of the limit in the 3x3 matrix; s..: the inverse of the 3x3
    matrix. at: +1 at the lower limit, -1 at the upper, 0 between.
    """

    rax: Array
    ray: Array
    rbx: Array
    rby: Array
    k11: Array
    k12: Array
    k22: Array
    ex: Array
    ey: Array
    s11: Array
    s12: Array
    s13: Array
    s22: Array
    s23: Array
    s33: Array
    at: Array


def barrier(quantity: Any, go: Array | None = None) -> Any:
    """Make XLA compute and store a pytree of arrays here.

    Left alone, its CPU compiler fuses what follows with what precedes and computes it anew for each
    of its uses, at worst exponentially often. It (jaxlib 0.10) looks through
    `jax.lax.optimization_barrier`, but not through a branch that only the data decide: go, see
    `always`. Shared by many, it is computed once; without it the quantity serves.
    """
    leaves, treedef = jax.tree.flatten(quantity)
    if go is None:
        go = always(next(a for a in leaves if a.dtype == jnp.float32 or a.dtype == jnp.int32))
    alike: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        alike.setdefault((leaf.shape, leaf.dtype), []).append(i)

    def never(leaves):
        """Something else, which costs little to compile: arrays that are alike change places."""
        out = list(leaves)
        for places in alike.values():
            for here, there in zip(places, places[1:] + places[:1], strict=True):
                out[here] = leaves[there]
        if len(alike) == len(leaves):
            out[0] = jnp.zeros_like(out[0])
        return out

    leaves = jax.lax.cond(go, lambda leaves: list(leaves), never, leaves)
    return jax.tree.unflatten(treedef, leaves)


def always(array: Array) -> Array:
    """True (), which XLA cannot know; array: any of float32 or int32."""
    bits = jax.lax.bitcast_convert_type(array.ravel()[0], jnp.int32)
    return (bits | 1) != 0


def stage(go: Array, function: Callable[..., Array], otherwise: Array, *args: Any) -> Array:
    """function(otherwise, *args), computed as a whole before what follows: see `barrier`.

    go: `always`. otherwise: has the shape of what comes out, so it would do if `go` were false.
    """
    return jax.lax.cond(go, function, lambda otherwise, *_: otherwise, otherwise, *args)


def stack(*parts: Array) -> Array:
    """Stacked along a new first axis, in memory: fused with others, it would branch per element."""
    return jnp.stack(parts)


def leg(quantity: Any, j: int) -> Any:
    """One leg's part of a pytree of arrays (2, ...)."""
    return jax.tree.map(lambda leaf: leaf[j], quantity)


def both(leg0: Any, leg1: Any) -> Any:
    """The inverse of `leg`."""
    return jax.tree.map(stack, leg0, leg1)


def _of(constants: np.ndarray, j: int | None, like: Array) -> Any:
    """The constant of joint j, or of both to go with an array (2, ...)."""
    return constants.reshape(2, *[1] * (like.ndim - 1)) if j is None else constants[j]


def anchors(
    hull_angle: Array, leg_angle: Array, j: int | None
) -> tuple[Array, Array, Array, Array]:
    """From centre of mass to anchor [m], world frame: hull x, y, leg x, y. j: see `make_joint`."""
    sin, cos = jnp.sin(hull_angle), jnp.cos(hull_angle)
    rax, ray = sin * HULL_CENTRE, -cos * HULL_CENTRE
    sin, cos = jnp.sin(leg_angle), jnp.cos(leg_angle)
    x = _of(SIDE, j, leg_angle) * ANCHOR_X
    return rax, ray, cos * x - sin * ANCHOR_Y, sin * x + cos * ANCHOR_Y


def joint_angle(hull_angle: Array, leg_angle: Array, j: int | None) -> Array:
    """Angle [rad] of joint j, 0 when it was made."""
    return leg_angle - hull_angle - _of(REFERENCE, j, leg_angle)


def make_joint(hull_angle: Array, leg_angle: Array, j: int | None) -> Joint:
    """Prepare joint j at given angles [rad]; None: both, the leg's angles are (2, ...)."""
    rax, ray, rbx, rby = anchors(hull_angle, leg_angle, j)
    mass = HULL_INV_MASS + LEG_INV_MASS
    ia, ib = HULL_INV_INERTIA, LEG_INV_INERTIA
    a11 = mass + ray * ray * ia + rby * rby * ib
    a12 = -ray * rax * ia - rby * rbx * ib
    a13 = -ray * ia - rby * ib
    a22 = mass + rax * rax * ia + rbx * rbx * ib
    a23 = rax * ia + rbx * ib
    a33 = ia + ib
    inv_det2 = 1.0 / (a11 * a22 - a12 * a12)
    c11 = a22 * a33 - a23 * a23
    c12 = a13 * a23 - a12 * a33
    c13 = a12 * a23 - a13 * a22
    inv_det3 = 1.0 / (a11 * c11 + a12 * c12 + a13 * c13)
    angle = joint_angle(hull_angle, leg_angle, j)
    low, high = _of(LOWER, j, leg_angle), _of(UPPER, j, leg_angle)
    at = jnp.where(angle <= low, 1.0, jnp.where(angle >= high, -1.0, 0.0))
    return Joint(
        rax=jnp.broadcast_to(rax, leg_angle.shape),
        ray=jnp.broadcast_to(ray, leg_angle.shape),
        rbx=rbx,
        rby=rby,
        k11=a22 * inv_det2,
        k12=-a12 * inv_det2,
        k22=a11 * inv_det2,
        ex=a13,
        ey=a23,
        s11=c11 * inv_det3,
        s12=c12 * inv_det3,
        s13=c13 * inv_det3,
        s22=(a11 * a33 - a13 * a13) * inv_det3,
        s23=(a12 * a13 - a11 * a23) * inv_det3,
        s33=(a11 * a22 - a12 * a12) * inv_det3,
        at=at.astype(jnp.float32),
    )


def apply_joint(
    joint: Joint, hull: Velocity, leg: Velocity, px: Array, py: Array, torque: Array
) -> tuple[Velocity, Velocity]:
    """Velocities after an impulse (px, py) [N s] and a torque impulse [N m s] on the leg."""
    ia, ib = HULL_INV_INERTIA, LEG_INV_INERTIA
    hull = Velocity(
        hull.x - HULL_INV_MASS * px,
        hull.y - HULL_INV_MASS * py,
        hull.w - ia * (joint.rax * py - joint.ray * px + torque),
    )
    leg = Velocity(
        leg.x + LEG_INV_MASS * px,
        leg.y + LEG_INV_MASS * py,
        leg.w + ib * (joint.rbx * py - joint.rby * px + torque),
    )
    return hull, leg


def solve_joint(
    joint: Joint, hull: Velocity, leg: Velocity, impulse: JointImpulse, j: int
) -> JointImpulse:
    """One sweep over joint j: the change of its accumulated impulses.

    First the motor, clamped to its torque; then the anchor together with the limit, if it is
    reached; if the limit would have to pull, its impulse is taken back and the anchor solved alone.
    What is applied is the increment before it is rounded into the sum, as in Box2D: a leg weighs so
    little that the difference shows.
    """
    ia, ib = HULL_INV_INERTIA, LEG_INV_INERTIA
    wanted = impulse.motor - MOTOR_MASS * (leg.w - hull.w - MOTOR_SPEED[j])
    motor = jnp.clip(wanted, -MAX_MOTOR_IMPULSE, MAX_MOTOR_IMPULSE)
    turn = motor - impulse.motor
    hull_w = hull.w - ia * turn
    leg_w = leg.w + ib * turn
    cx = leg.x - leg_w * joint.rby - hull.x + hull_w * joint.ray
    cy = leg.y + leg_w * joint.rbx - hull.y - hull_w * joint.rax
    cw = leg_w - hull_w
    x3 = -(joint.s11 * cx + joint.s12 * cy + joint.s13 * cw)
    y3 = -(joint.s12 * cx + joint.s22 * cy + joint.s23 * cw)
    z3 = -(joint.s13 * cx + joint.s23 * cy + joint.s33 * cw)
    slack = joint.at * (impulse.limit + z3) <= 0.0  # between the limits: at is 0
    bx, by = impulse.limit * joint.ex - cx, impulse.limit * joint.ey - cy
    x2 = joint.k11 * bx + joint.k12 * by
    y2 = joint.k12 * bx + joint.k22 * by
    return JointImpulse(
        motor=turn,
        x=jnp.where(slack, x2, x3),
        y=jnp.where(slack, y2, y3),
        limit=jnp.where(slack, -impulse.limit, z3),
    )


def apply_change(
    joint: Joint, hull: Velocity, leg: Velocity, change: JointImpulse
) -> tuple[Velocity, Velocity]:
    """Velocities of hull and leg after `solve_joint` has changed the impulses."""
    turn, px, py, limit = change
    ia, ib = HULL_INV_INERTIA, LEG_INV_INERTIA
    hull = Velocity(
        hull.x - HULL_INV_MASS * px,
        hull.y - HULL_INV_MASS * py,
        (hull.w - ia * turn) - ia * (joint.rax * py - joint.ray * px + limit),
    )
    leg = Velocity(
        leg.x + LEG_INV_MASS * px,
        leg.y + LEG_INV_MASS * py,
        (leg.w + ib * turn) + ib * (joint.rbx * py - joint.rby * px + limit),
    )
    return hull, leg


def move(pose: Pose, velocity: Velocity, dt: Array) -> tuple[Pose, Velocity]:
    """Integrate for dt [s]; faster than 2 m or a quarter turn a step is slowed down."""
    dx, dy, da = dt * velocity.x, dt * velocity.y, dt * velocity.w
    squared = dx * dx + dy * dy
    slow = jnp.where(squared > MAX_TRANSLATION**2, MAX_TRANSLATION / jnp.sqrt(squared), 1.0)
    slow_w = jnp.where(jnp.abs(da) > MAX_ROTATION, MAX_ROTATION / jnp.abs(da), 1.0)
    velocity = Velocity(velocity.x * slow, velocity.y * slow, velocity.w * slow_w)
    pose = Pose(pose.x + dt * velocity.x, pose.y + dt * velocity.y, pose.a + dt * velocity.w)
    return pose, velocity


def correct_joint(hull: Pose, leg: Pose, at: Array, j: int) -> tuple[Pose, Pose, Array]:
    """One position sweep over joint j: the poses after it, and whether it was in order before.

    at: +1, -1, 0 as in `Joint`: which limit counts was decided at the start of the step.
    """
    ia, ib = HULL_INV_INERTIA, LEG_INV_INERTIA
    angle = joint_angle(hull.a, leg.a, j)
    low = jnp.clip(angle - LOWER[j] + ANGULAR_SLOP, -MAX_ANGULAR_CORRECTION, 0.0)
    high = jnp.clip(angle - UPPER[j] - ANGULAR_SLOP, 0.0, MAX_ANGULAR_CORRECTION)
    excess = jnp.where(at > 0, low, jnp.where(at < 0, high, 0.0))
    error = jnp.where(at > 0, LOWER[j] - angle, jnp.where(at < 0, angle - UPPER[j], 0.0))
    turn = -MOTOR_MASS * excess
    hull_a, leg_a = hull.a - ia * turn, leg.a + ib * turn

    rax, ray, rbx, rby = anchors(hull_a, leg_a, j)
    cx, cy = leg.x + rbx - hull.x - rax, leg.y + rby - hull.y - ray
    mass = HULL_INV_MASS + LEG_INV_MASS
    k11 = mass + ia * ray * ray + ib * rby * rby
    k12 = -ia * rax * ray - ib * rbx * rby
    k22 = mass + ia * rax * rax + ib * rbx * rbx
    inv_det = 1.0 / (k11 * k22 - k12 * k12)
    px = -inv_det * (k22 * cx - k12 * cy)
    py = -inv_det * (k11 * cy - k12 * cx)
    is_fine = (cx * cx + cy * cy <= LINEAR_SLOP**2) & (error <= ANGULAR_SLOP)
    hull = Pose(
        hull.x - HULL_INV_MASS * px,
        hull.y - HULL_INV_MASS * py,
        hull_a - ia * (rax * py - ray * px),
    )
    leg = Pose(
        leg.x + LEG_INV_MASS * px,
        leg.y + LEG_INV_MASS * py,
        leg_a + ib * (rbx * py - rby * px),
    )
    return hull, leg, is_fine


def is_slow(velocity: Velocity) -> Array:
    """Whether a body is slow enough to fall asleep, bool."""
    squared = velocity.x * velocity.x + velocity.y * velocity.y
    return (velocity.w * velocity.w <= ANGULAR_SLEEP**2) & (squared <= LINEAR_SLEEP**2)
