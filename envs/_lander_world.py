"""One step of Box2D's world for a lander over its terrain.

Conventions and units as in `_rigid_body`. The order of things is that of `b2World::Step` of
Box2D 2.3 (Erin Catto, https://box2d.org, zlib licence), which the environment inherits bug for bug:
contacts are found at the poses of before the step; velocities get the forces, then 180 sweeps of
sequential impulses that do not converge; poses are integrated, then corrected; bodies fall asleep;
at last continuous collision moves a leg that went through the ground back, without its joint.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _contacts, _rigid_body
from ._contacts import (
    HULL_VERTICES,
    LEG_VERTICES,
    ContactImpulse,
    Edge,
    Manifold,
    correct_contact,
    solve_contact,
)
from ._rigid_body import (
    DT,
    HULL_INV_INERTIA,
    HULL_INV_MASS,
    LINEAR_SLOP,
    JointImpulse,
    Pose,
    Velocity,
    always,
    barrier,
    both,
    leg,
    stack,
    stage,
)

Array = Any

NUM_EDGES = 10
EDGE_WIDTH = np.float32(2.0)  # [m]
SLEEP_STEPS = 25  # slow steps in a row: 0.5 s
FAT = np.float32(0.1)  # [m] added to the boxes of the broad phase
POLYGON_RADIUS = np.float32(0.01)
EDGE_FAT = np.float32(0.11)
NEAR = np.float32(0.02)  # [m] from a leg's box to an edge's: to be expected to touch
HULL_REACH = np.float32(0.75)  # [m] from the centre of mass to any vertex, and some


class Pairs(NamedTuple):
    """The ground under each leg: two edges at most, newest first; (slot, leg, ...) each.

    edge: index 0 to 9, -1 for none. key, valid, impulse: of the points, (point, slot, leg, ...).
    """

    edge: Array  # int32
    touching: Array  # bool
    key: Array  # int32
    valid: Array  # bool
    impulse: ContactImpulse


class World(NamedTuple):
    """The state of the physics; box: (4, leg, ...), the fat box x0, y0, x1, y1 of each leg."""

    hull: Pose
    leg: Pose
    hull_velocity: Velocity
    leg_velocity: Velocity
    joint: JointImpulse  # (leg, ...)
    pairs: Pairs
    box: Array
    slow_steps: Array  # int32, in a row
    flag: Array  # (leg, ...) bool: what the contact listener believes
    game_over: Array  # bool, the hull has touched the ground
    awake: Array  # bool


class Solver(NamedTuple):
    """How often things are repeated: Box2D as Gymnasium calls it, or less."""

    velocity_sweeps: int = 180
    position_sweeps: int = 60
    impacts: int = 8  # continuous collisions of a leg in one step


EXACT = Solver()
FAST = Solver(velocity_sweeps=60, position_sweeps=4, impacts=1)


def edge_at(terrain: Array, index: Array) -> Edge:
    """Edges by their indices (slot, leg, ...), terrain (11, ...) heights [m]. Any edge for -1."""
    first = jnp.maximum(index, 0)
    ends = stack(first, first + 1).reshape(-1, *terrain.shape[1:])
    y1, y2 = jnp.take_along_axis(terrain, ends, axis=0, mode="clip").reshape(2, *index.shape)
    x1 = first.astype(jnp.float32) * EDGE_WIDTH
    return Edge(x1, y1, x1 + EDGE_WIDTH, y2)


def no_pairs(shape: tuple[int, ...]) -> Pairs:
    """Of legs in the air; shape: that of the trailing axes."""
    zero = jnp.zeros((2, 2, 2, *shape), jnp.float32)
    return Pairs(
        edge=jnp.full((2, 2, *shape), -1, jnp.int32),
        touching=jnp.zeros((2, 2, *shape), bool),
        key=jnp.zeros((2, 2, 2, *shape), jnp.int32),
        valid=jnp.zeros((2, 2, 2, *shape), bool),
        impulse=ContactImpulse(zero, zero),
    )


def _slots(pose: Pose) -> Pose:
    return jax.tree.map(lambda a: stack(a, a), pose)


def _keep(condition: Array, pairs: Pairs) -> Pairs:
    """Forget all about pairs that do not fulfil the condition (slot, leg, ...)."""
    return Pairs(
        edge=jnp.where(condition, pairs.edge, -1),
        touching=pairs.touching & condition,
        key=pairs.key,
        valid=pairs.valid & condition[None],
        impulse=jax.tree.map(lambda a: jnp.where(condition[None], a, 0.0), pairs.impulse),
    )


def _exchange(condition: Array, pairs: Pairs) -> Pairs:
    """Exchange the slots where the condition (leg, ...) holds."""

    def of_pairs(a):
        return jnp.where(condition[None], a[::-1], a)

    def of_points(a):
        return jnp.where(condition[None, None], a[:, ::-1], a)

    return Pairs(
        edge=of_pairs(pairs.edge),
        touching=of_pairs(pairs.touching),
        key=of_points(pairs.key),
        valid=of_points(pairs.valid),
        impulse=jax.tree.map(of_points, pairs.impulse),
    )


_OF_POINTS = {"qx", "qy", "key", "valid", "rx", "ry", "normal_mass", "tangent_mass"}


def _slot(quantity: Any, s: int | Array, p: int | Array | None = None) -> Any:
    """One slot's part of a `Manifold` or `Contact` of all pairs; p: of one of its two points."""
    points = slice(None) if p is None else p
    return quantity._replace(
        **{
            name: leaf[points, s] if name in _OF_POINTS else leaf[s]
            for name, leaf in quantity._asdict().items()
        }
    )


def leg_boxes(pose: Pose) -> tuple[Array, Array, Array, Array]:
    """Bounding box of each leg at a pose."""
    sin, cos = jnp.abs(jnp.sin(pose.a)), jnp.abs(jnp.cos(pose.a))
    x, y = float(LEG_VERTICES[2, 0]), float(LEG_VERTICES[2, 1])
    dx = cos * x + sin * y + POLYGON_RADIUS
    dy = sin * x + cos * y + POLYGON_RADIUS
    return pose.x - dx, pose.y - dy, pose.x + dx, pose.y + dy


def grow_boxes(box: Array, start: Pose, end: Pose) -> tuple[Array, Array]:
    """Boxes of the broad phase after a motion, and which legs (leg, ...) have got a new one."""
    ax0, ay0, ax1, ay1 = leg_boxes(start)
    bx0, by0, bx1, by1 = leg_boxes(end)
    x0, y0 = jnp.minimum(ax0, bx0), jnp.minimum(ay0, by0)
    x1, y1 = jnp.maximum(ax1, bx1), jnp.maximum(ay1, by1)
    moved = (x0 < box[0]) | (y0 < box[1]) | (x1 > box[2]) | (y1 > box[3])
    dx, dy = 2.0 * (end.x - start.x), 2.0 * (end.y - start.y)
    new = jnp.stack(
        [
            x0 - FAT + jnp.minimum(dx, 0.0),
            y0 - FAT + jnp.minimum(dy, 0.0),
            x1 + FAT + jnp.maximum(dx, 0.0),
            y1 + FAT + jnp.maximum(dy, 0.0),
        ]
    )
    return jnp.where(moved[None], new, box), moved


def overlaps(box: Array, terrain: Array, index: Array, fat: Array = EDGE_FAT) -> Array:
    """Whether boxes (4, leg, ...) overlap those of edges index (slot, leg, ...), bool.

    fat: by how much the boxes of the edges are grown [m].
    """
    edge = edge_at(terrain, index)
    x_apart = (box[0][None] > edge.x2 + fat) | (box[2][None] < edge.x1 - fat)
    y_apart = (box[1][None] > jnp.maximum(edge.y1, edge.y2) + fat) | (
        box[3][None] < jnp.minimum(edge.y1, edge.y2) - fat
    )
    return ~x_apart & ~y_apart & (index >= 0) & (index < NUM_EDGES)


def edges_below(box: Array) -> Array:
    """The (at most) two edges (2, leg, ...) int32 within the width of each box; -1: outside."""
    low = jnp.floor((box[0] - EDGE_FAT) / EDGE_WIDTH).astype(jnp.int32)
    high = jnp.floor((box[2] + EDGE_FAT) / EDGE_WIDTH).astype(jnp.int32)
    index = stack(low, jnp.where(high > low, low + 1, -1))
    return jnp.where((index >= 0) & (index < NUM_EDGES), index, -1)


def find_pairs(pairs: Pairs, box: Array, moved: Array, terrain: Array) -> Pairs:
    """Add the edges that moved legs have come near to; the higher index counts as newer."""
    index = edges_below(box)
    near = overlaps(box, terrain, index) & moved[None]

    def add(i, pairs):
        edge = index[i]
        known = (pairs.edge[0] == edge) | (pairs.edge[1] == edge)
        new = near[i] & ~known
        # make room in front: what is there moves back, unless there is nothing
        pairs = _exchange(new & (pairs.edge[0] >= 0), pairs)
        here = stack(~new, jnp.ones_like(new))
        pairs = _keep(here, pairs)
        return pairs._replace(edge=stack(jnp.where(new, edge, pairs.edge[0]), pairs.edge[1]))

    return jax.lax.fori_loop(0, 2, add, pairs)  # rolled, as it is compiled faster


def _update(
    pairs: Pairs, manifold: Manifold, wanted: Array, flag: Array, go: Array | None = None
) -> tuple[Pairs, Array]:
    """New manifolds of the wanted pairs (slot, leg, ...), and the flags (leg, ...) after the
    listener has heard of them, newest pair first.
    """
    valid = manifold.valid & wanted[None]
    impulse = _contacts.inherit(
        manifold._replace(valid=valid), pairs.key, pairs.valid, pairs.impulse
    )
    touching = valid[0]
    for slot in (0, 1):
        begins = wanted[slot] & touching[slot] & ~pairs.touching[slot]
        ends = wanted[slot] & ~touching[slot] & pairs.touching[slot]
        flag = (flag | begins) & ~ends
    w = wanted[None]
    return barrier(
        (
            Pairs(
                edge=pairs.edge,
                touching=jnp.where(wanted, touching, pairs.touching),
                key=jnp.where(w, manifold.key, pairs.key),
                valid=jnp.where(w, valid, pairs.valid),
                impulse=jax.tree.map(lambda a, b: jnp.where(w, a, b), impulse, pairs.impulse),
            ),
            flag,
        ),
        go,
    )


def _start_joints(world, go):
    """Both joints (leg, ...) at the poses of the world, and their impulses of the step before."""
    joint = barrier(_rigid_body.make_joint(world.hull.a[None], world.leg.a, None), go)
    impulse = world.joint
    impulse = impulse._replace(limit=jnp.where(joint.at == 0.0, 0.0, impulse.limit))
    return joint, impulse


def _start_warm(joint, impulse, hull, legs, go):
    """Velocities of hull and legs (leg, ...) after the impulses of the step before."""
    turn = impulse.motor + impulse.limit
    hull_turn = joint.rax * impulse.y - joint.ray * impulse.x + turn
    for j in (1, 0):
        hull = Velocity(
            hull.x - HULL_INV_MASS * impulse.x[j],
            hull.y - HULL_INV_MASS * impulse.y[j],
            hull.w - HULL_INV_INERTIA * hull_turn[j],
        )
    legs = Velocity(
        legs.x + _rigid_body.LEG_INV_MASS * impulse.x,
        legs.y + _rigid_body.LEG_INV_MASS * impulse.y,
        legs.w
        + _rigid_body.LEG_INV_INERTIA * (joint.rbx * impulse.y - joint.rby * impulse.x + turn),
    )
    return barrier((hull, legs), go)


def _velocity_sweeps(go, hull, legs, joint, joint_impulse, contact, contact_impulse, num_sweeps):
    """All velocity sweeps. hull, legs (leg, ...), joint impulses (leg, ...): before them; contact
    impulses (point, slot, leg, ...).

    What is carried and what a stage gives is packed into single arrays: XLA computes each array on
    its own, from the inputs of the stage.
    """

    def velocities(rows):
        return tuple(Velocity(*rows[3 * i : 3 * i + 3]) for i in range(3))

    def visit(j):
        def change(impulse, rows, *before):
            hull, *legs = velocities(rows)
            if before:  # joint 1 moves the hull before joint 0 is visited
                hull, _ = _rigid_body.apply_change(
                    leg(joint, 1), hull, legs[1], JointImpulse(*before[0])
                )
            old = JointImpulse(*impulse)
            return jnp.stack(_rigid_body.solve_joint(leg(joint, j), hull, legs[j], old, j))

        return change

    def after_joints(rows, change1, change0):
        hull, leg0, leg1 = velocities(rows)
        hull, leg1 = _rigid_body.apply_change(leg(joint, 1), hull, leg1, JointImpulse(*change1))
        hull, leg0 = _rigid_body.apply_change(leg(joint, 0), hull, leg0, JointImpulse(*change0))
        return jnp.stack([*hull, *leg0, *leg1])

    def sweep(_, carry):
        rows, (impulse0, impulse1), contact_impulse = carry
        change1 = stage(go, visit(1), impulse1, rows)
        change0 = stage(go, visit(0), impulse0, rows, change1)
        rows = stage(go, after_joints, rows, change1, change0)
        legs = jnp.stack([rows[3:6], rows[6:9]], axis=1)  # (3, leg, ...)
        legs, contact_impulse = _contact_sweep(go, contact, legs, contact_impulse)
        rows = jnp.concatenate([rows[:3], legs[:, 0], legs[:, 1]])
        return rows, (impulse0 + change0, impulse1 + change1), contact_impulse

    legs = stack(*legs)  # (3, leg, ...)
    rows = jnp.concatenate([stack(*hull), legs[:, 0], legs[:, 1]])
    impulse = tuple(stack(*leg(joint_impulse, j)) for j in (0, 1))  # (4, ...) each
    packed = stack(*contact_impulse)
    packed = tuple(packed[:, :, s].reshape(4, *packed.shape[3:]) for s in (0, 1))
    carry = barrier((rows, impulse, packed), go)
    rows, impulse, packed = jax.lax.fori_loop(0, num_sweeps, sweep, carry)
    rows, impulse, packed = barrier((rows, stack(*impulse), jnp.stack(packed, axis=1)), go)
    legs = Velocity(*(stack(rows[3 + i], rows[6 + i]) for i in range(3)))
    return (
        Velocity(*rows[:3]),
        legs,
        JointImpulse(*(impulse[:, i] for i in range(4))),
        ContactImpulse(packed[:2], packed[2:]),
    )


def _contact_sweep(go, contact, legs, impulses):
    """One velocity sweep over the contacts of both legs, slot after slot.

    contact: of all pairs; legs: velocities (3, leg, ...); impulses: per slot (4, leg, ...), two
    normal, two tangent.
    """

    def visit(slot):
        def new(old, legs):
            impulse = solve_contact(
                _slot(contact, slot), Velocity(*legs), ContactImpulse(old[:2], old[2:])
            )
            return jnp.stack([*impulse.normal, *impulse.tangent])

        return new

    def after(slot):
        def moved(legs, change):
            return jnp.stack(
                _contacts.apply_contact(
                    _slot(contact, slot), Velocity(*legs), change[:2], change[2:]
                )
            )

        return moved

    new = []
    for slot, old in enumerate(impulses):
        impulse = stage(go, visit(slot), old, legs)
        legs = stage(go, after(slot), legs, impulse - old)
        new.append(impulse)
    return legs, tuple(new)


def _correct_contacts(manifold, legs, factor):
    """One position sweep over all contacts of the legs, slot after slot, point after point.

    Returns the poses (leg, ...) after it and the least separation (leg, ...) of each, 0 at most.
    """

    def visit(i, carry):
        legs, least = carry
        point = _slot(manifold, i // 2, i % 2)
        legs, separation = correct_contact(point, legs, factor)
        return legs, jnp.minimum(least, separation)

    # rolled, as it is compiled faster
    return jax.lax.fori_loop(0, 4, visit, (legs, jnp.zeros_like(legs.x)))


def _position_sweeps(go, hull, legs, manifold, at, num_sweeps):
    """Correct poses until all errors are small, at most num_sweeps times, each scene for itself.

    Returns hull, legs, and whether the errors were small in the end.
    """

    def is_running(carry):
        count, _, _, done = carry
        return (count < num_sweeps) & ~jnp.all(done)

    def sweep(carry):
        count, hull, legs, done = carry
        new_legs, least = _correct_contacts(manifold, legs, np.float32(0.2))
        fine = jnp.all(least >= -3.0 * LINEAR_SLOP, axis=0)
        new_hull, single = hull, [leg(new_legs, 0), leg(new_legs, 1)]
        for j in (1, 0):
            new_hull, single[j], ok = _rigid_body.correct_joint(new_hull, single[j], at[j], j)
            fine = fine & ok
            new_hull, single[j] = barrier((new_hull, single[j]), go)
        new_legs = both(*single)
        hull = jax.tree.map(lambda a, b: jnp.where(done, a, b), hull, new_hull)
        legs = jax.tree.map(lambda a, b: jnp.where(done[None], a, b), legs, new_legs)
        return count + 1, hull, legs, done | fine

    done = jnp.zeros(hull.x.shape, bool)
    _, hull, legs, done = jax.lax.while_loop(is_running, sweep, (jnp.int32(0), hull, legs, done))
    return hull, legs, done


class _Phase(NamedTuple):
    """Between the phases of a step: see `full_step`. (leg, ...) unless said otherwise."""

    count: Array  # () int32 of phases done
    world: World
    start: Pose  # of the legs' motion that is looked at
    pose: Pose  # where the legs are when they meet the ground
    alpha0: Array  # share of the step done at start
    alpha: Array  # and at pose
    meets: Array  # bool (slot, leg, ...): the pairs that count at pose
    newer_first: Array  # bool: of two pairs slot 0 is the one that meets
    happens: Array  # bool: there is a meeting
    disabled: Array  # bool (slot, leg, ...): pairs that are through with


def full_step(
    world: World,
    terrain: Array,
    gravity: Array,
    force_x: Array,
    force_y: Array,
    torque: Array,
    solver: Solver = EXACT,
) -> World:
    """One step of 0.02 s, whatever the lander touches.

    terrain: heights (11, ...) [m] at x = 0, 2, ..., 20; gravity (...) [m/s^2], negative: downward;
    force (...) [N] and torque [N m] on the hull.

    It has phases, which find and count contacts in the same way, so that this is compiled once. In
    phase 0 the legs meet the ground at the poses of before the step, and all is solved. The others
    are continuous collision: a leg that comes too close to the ground on its way is put where that
    happens; there it is pushed out and its velocity is corrected, by its contacts alone; then it
    does what is left of the step. The joint hears of it in the next step.
    """
    go = always(terrain)
    falls = DT * gravity, DT * (gravity + HULL_INV_MASS * force_y)

    def solve(world, _, manifold, contact, __):
        """Phase 0: a world after its step, but for what its legs come near to."""
        hull_velocity = Velocity(
            world.hull_velocity.x + DT * (HULL_INV_MASS * force_x),
            world.hull_velocity.y + falls[1],
            world.hull_velocity.w + DT * (HULL_INV_INERTIA * torque),
        )
        legs_velocity = world.leg_velocity._replace(y=world.leg_velocity.y + falls[0][None])
        for slot in (0, 1):
            of_slot = _slot(contact, slot)
            solved = of_slot.tangent_mass > 0.0
            impulse = jax.tree.map(lambda a, s=slot: a[:, s], world.pairs.impulse)
            impulse = jax.tree.map(lambda a, c=solved: jnp.where(c, a, 0.0), impulse)
            legs_velocity = _contacts.apply_contact(of_slot, legs_velocity, *impulse)
        joint, joint_impulse = _start_joints(world, go)
        hull_velocity, legs_velocity = barrier((hull_velocity, legs_velocity), go)
        hull_velocity, legs_velocity = _start_warm(
            joint, joint_impulse, hull_velocity, legs_velocity, go
        )
        hull_velocity, legs_velocity, joint_impulse, impulse = _velocity_sweeps(
            go,
            hull_velocity,
            legs_velocity,
            joint,
            joint_impulse,
            contact,
            world.pairs.impulse,
            solver.velocity_sweeps,
        )
        hull, hull_velocity = _rigid_body.move(world.hull, hull_velocity, DT)
        legs, legs_velocity = _rigid_body.move(world.leg, legs_velocity, DT)
        hull, legs, corrected = _position_sweeps(
            go, hull, legs, manifold, joint.at, solver.position_sweeps
        )
        slow = _rigid_body.is_slow(legs_velocity)
        slow = slow[0] & slow[1] & _rigid_body.is_slow(hull_velocity)
        slow_steps = jnp.where(slow, world.slow_steps + 1, 0)
        awake = ~((slow_steps >= SLEEP_STEPS) & corrected)
        touches = _hull_touches(world.hull, hull, terrain, awake, go)
        return world._replace(
            hull=hull,
            leg=legs,
            hull_velocity=jax.tree.map(lambda a: jnp.where(awake, a, 0.0), hull_velocity),
            leg_velocity=jax.tree.map(lambda a: jnp.where(awake[None], a, 0.0), legs_velocity),
            joint=joint_impulse,
            pairs=world.pairs._replace(impulse=impulse),
            slow_steps=slow_steps,
            game_over=world.game_over | touches,
            awake=awake,
        )

    def settle(world, pose, _, contact, rest):
        """Later phases: the legs after the rest of their step [s] from a pose at the ground."""

        def is_unsettled(carry):
            count, _, _, settled = carry
            return (count < solver.velocity_sweeps) & ~settled

        def sweep(carry):
            count, velocity, impulse, _ = carry
            velocity, new = _contact_sweep(go, contact, velocity, impulse)
            same = jnp.all(new[0] == impulse[0]) & jnp.all(new[1] == impulse[1])
            return count + 1, velocity, new, same

        impulse = jnp.zeros((4, *pose.x.shape), jnp.float32)
        carry = (jnp.int32(0), stack(*world.leg_velocity), (impulse, impulse), jnp.bool_(False))
        velocity = Velocity(*jax.lax.while_loop(is_unsettled, sweep, carry)[1])
        legs, velocity = _rigid_body.move(pose, velocity, rest)
        return world._replace(leg=legs, leg_velocity=velocity)

    def run(carry):
        count, world, start, pose, alpha0, alpha, meets, newer_first, happens, disabled = carry
        is_first = count == 0
        exists = world.pairs.edge >= 0
        edge = edge_at(terrain, world.pairs.edge)
        manifold = barrier(_contacts.collide(edge, _slots(pose), LEG_VERTICES, go), go)
        # a pair whose boxes are apart is dropped, in its turn: as if it touched no more
        alive = overlaps(world.box, terrain, world.pairs.edge) | ~is_first
        manifold = manifold._replace(valid=manifold.valid & alive[None])
        # the pair that meets is heard of first, then the other
        touches = jnp.where(newer_first, manifold.valid[0, 0], manifold.valid[0, 1])
        others = ~meets & happens[None] & touches[None] & exists
        heard = stack(meets, others)
        pairs, flag = jax.lax.fori_loop(
            0,
            2,
            lambda i, c: _update(c[0], manifold, heard[i], c[1], go),
            (world.pairs, world.flag),
        )
        gone = exists & ~alive
        pairs = _keep(~gone, pairs)
        has_gap = gone[0] & (pairs.edge[1] >= 0)
        disabled = (disabled & ~others) | (meets & ~touches[None] & ~is_first)
        active = happens & touches & ~is_first
        counts = (meets | others) & (active | is_first)[None]
        manifold = manifold._replace(valid=manifold.valid & counts[None])

        # the pair that meets comes first
        def in_front(name, leaf):
            other = leaf[:, ::-1] if name in _OF_POINTS else leaf[::-1]
            return jnp.where(newer_first[(None,) * (leaf.ndim - newer_first.ndim)], leaf, other)

        manifold = Manifold(**{n: in_front(n, leaf) for n, leaf in manifold._asdict().items()})
        manifold = barrier(manifold, go)

        def is_deep(carry):
            count, _, done = carry
            return (count < 20) & ~jnp.all(done)

        def push_out(carry):
            count, pose, done = carry
            new, least = _correct_contacts(manifold, pose, np.float32(0.75))
            pose = jax.tree.map(lambda a, b: jnp.where(done, a, b), pose, new)
            return count + 1, pose, done | (least >= -1.5 * LINEAR_SLOP)

        _, pose, _ = jax.lax.while_loop(is_deep, push_out, (jnp.int32(0), pose, ~active))
        contact = barrier(_contacts.make_contact(manifold, _slots(pose)), go)
        before = world._replace(pairs=pairs, flag=flag)
        world = jax.lax.cond(
            is_first, solve, settle, before, pose, manifold, contact, (1.0 - alpha) * DT
        )
        keep = ~(active | is_first)
        legs, velocity = jax.tree.map(
            lambda new, old: jnp.where(keep, old, new),
            (world.leg, world.leg_velocity),
            (before.leg, before.leg_velocity),
        )
        start = jax.tree.map(lambda new, old: jnp.where(active, new, old), pose, start)

        # new pairs; first close the gap that a dropped one has left
        box, moved = grow_boxes(world.box, start, legs)
        box = jnp.where(keep[None], world.box, box)
        pairs = _exchange(has_gap, world.pairs)
        pairs = find_pairs(pairs, box, moved & ~keep, terrain)
        world = world._replace(leg=legs, leg_velocity=velocity, pairs=pairs, box=box)
        world, start = barrier((world, start), go)

        # the next meeting on the way of the legs that had one; after phase 0, of all
        alpha0 = jnp.where(active, alpha, alpha0)
        again = jnp.where(is_first, world.awake[None], happens) & (count < solver.impacts)
        wanted = again[None] & (world.pairs.edge >= 0) & ~disabled
        t, hit = _contacts.time_of_impact(
            edge_at(terrain, world.pairs.edge),
            _slots(start),
            _slots(world.leg),
            LEG_VERTICES,
            wanted,
            go,
        )
        alpha = jnp.where(hit, alpha0[None] + (1.0 - alpha0[None]) * t, 1.0)
        happens = hit & (alpha < 1.0 - 10.0 * np.finfo(np.float32).eps)
        newer_first = ~(alpha[1] < alpha[0])  # among equals the newer
        happens = happens[0] | happens[1]
        alpha = jnp.minimum(alpha[0], alpha[1])
        beta = (alpha - alpha0) / (1.0 - alpha0)
        pose = jax.tree.map(lambda a, b: a + beta * (b - a), start, world.leg)
        pose = barrier(pose, go)
        meets = stack(newer_first, ~newer_first) & happens[None]
        return _Phase(
            count + 1,
            world,
            start,
            pose,
            alpha0,
            alpha,
            meets,
            newer_first,
            happens,
            disabled,
        )

    zero = jnp.zeros_like(world.leg.x)
    yes = jnp.ones(zero.shape, bool)
    carry = _Phase(
        count=jnp.int32(0),
        world=world,
        start=world.leg,
        pose=world.leg,
        alpha0=zero,
        alpha=zero,
        meets=world.pairs.edge >= 0,
        newer_first=yes,
        happens=yes,
        disabled=jnp.zeros(world.pairs.edge.shape, bool),
    )
    return jax.lax.while_loop(lambda c: (c.count == 0) | jnp.any(c.happens), run, carry).world


def _hull_touches(before: Pose, after: Pose, terrain: Array, awake: Array, go: Array) -> Array:
    """Whether the hull is within the skins of the ground before, or stopped by it on the way."""
    poses = both(before, after)
    distance = _contacts.distance(_hull_edges(poses, terrain), _slots(poses), HULL_VERTICES, go)
    distance = jnp.minimum(distance[0], distance[1])
    stopped = distance[1] <= _contacts.TOI_TARGET - _contacts.TOI_TOLERANCE
    return (distance[0] <= _contacts.SKIN) | (stopped & awake)


def _hull_edges(pose: Pose, terrain: Array) -> Edge:
    """The two edges under the ends of the hull."""
    low = jnp.floor((pose.x - HULL_REACH) / EDGE_WIDTH).astype(jnp.int32)
    high = jnp.floor((pose.x + HULL_REACH) / EDGE_WIDTH).astype(jnp.int32)
    index = jnp.clip(stack(low, high), 0, NUM_EDGES - 1)
    return edge_at(terrain, index)


class _Affine(NamedTuple):
    """r -> matrix r + offset for r (4, ...): parts (4, 5, ...), the offset last."""

    parts: Array

    def after(self, first: "_Affine", go: Array) -> "_Affine":
        """This after the other."""
        a, b = self.parts, first.parts
        last = np.eye(5, dtype=np.float32)[4].reshape(1, 5, *[1] * (a.ndim - 2))
        product = a[:, 4, None] * last
        for k in range(4):
            product = product + a[:, k, None] * b[None, k]
        return _Affine(barrier(product, go))

    def __call__(self, r: Array, go: Array) -> Array:
        out = self.parts[:, 4]
        for k in range(4):
            out = out + self.parts[:, k] * r[k][None]
        return barrier(out, go)


def _air_velocities(go, hull, legs, joints, impulses, num_sweeps):
    """What `_velocity_sweeps` gives in the air, by matrix powers: 8 instead of 180 steps.

    Without contacts and as long as no clamp changes its mind, a sweep is an affine map of the two
    joints' errors, and after a sweep all but four of these are zero: that of joint 1 (turning, x,
    y) and of joint 0 (turning). So the errors after 180 sweeps, and their sum, which gives the
    impulses, come from powers of a 4 x 4 matrix. A leg at its limit: limit and anchor are solved as
    one and undo what the motor does, whose impulse grows by the same amount in each sweep until it
    is clamped. A leg between the limits: the motor, then the anchor.

    Returns hull, legs, impulses, and whether it is so (...): no clamp at work but the motor's
    against the limit. Elsewhere the result is worth nothing.
    """
    is_at = [joint.at != 0.0 for joint in joints]
    ia, ib = HULL_INV_INERTIA, _rigid_body.LEG_INV_INERTIA
    mh, ml = HULL_INV_MASS, _rigid_body.LEG_INV_MASS

    def errors(j):
        """Of joint j: turning, x, y."""
        joint, v = joints[j], legs[j]
        return (
            v.w - hull.w,
            v.x - v.w * joint.rby - hull.x + hull.w * joint.ray,
            v.y + v.w * joint.rbx - hull.y - hull.w * joint.rax,
        )

    def solve(j, error, speed):
        """Impulses (turning, x, y) of one visit of joint j; speed: the motor's, or 0."""
        w, x, y = error
        joint = joints[j]
        expand = (None,) * (w.ndim - joint.at.ndim)
        s13, s23, s33, s11, s12, s22, ex, ey, k11, k12, k22, at = (
            a[expand]
            for a in (
                *(joint.s13, joint.s23, joint.s33, joint.s11, joint.s12, joint.s22),
                *(joint.ex, joint.ey, joint.k11, joint.k12, joint.k22, is_at[j]),
            )
        )
        turn3 = -(s13 * x + s23 * y + s33 * w)
        x3, y3 = -(s11 * x + s12 * y + s13 * w), -(s12 * x + s22 * y + s23 * w)
        turn = -_rigid_body.MOTOR_MASS * (w - speed)
        bx, by = x + ex * turn, y + ey * turn
        x2, y2 = -(k11 * bx + k12 * by), -(k12 * bx + k22 * by)
        return jnp.where(at, turn3, turn), jnp.where(at, x3, x2), jnp.where(at, y3, y2)

    def response(joint, impulse, other):
        """What an impulse at one joint does to the errors of the other, through the hull."""
        turn, x, y = impulse
        expand = (None,) * (x.ndim - joint.at.ndim)
        rax, ray, oax, oay = (a[expand] for a in (joint.rax, joint.ray, other.rax, other.ray))
        dw = -ia * (rax * y - ray * x + turn)
        dx, dy = -mh * x, -mh * y
        return -dw, -dx + dw * oay, -dy - dw * oax

    def own(joint, impulse):
        """What an impulse at a joint does to its own errors."""
        turn, x, y = impulse
        expand = (None,) * (x.ndim - joint.at.ndim)
        rax, ray, rbx, rby = (a[expand] for a in (joint.rax, joint.ray, joint.rbx, joint.rby))
        dw = -ia * (rax * y - ray * x + turn)
        lw = ib * (rbx * y - rby * x + turn)
        return (
            lw - dw,
            (ml + mh) * x - lw * rby + dw * ray,
            (ml + mh) * y + lw * rbx - dw * rax,
        )

    def plus(a, b):
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def sweep(error1, error0, speeds):
        """One sweep: the impulses of both joints, the errors of both."""
        impulse1 = barrier(solve(1, error1, speeds[1]), go)
        error1 = plus(error1, own(joints[1], impulse1))
        error0 = plus(error0, response(joints[1], impulse1, joints[0]))
        error0 = barrier(error0, go)
        impulse0 = barrier(solve(0, error0, speeds[0]), go)
        error0 = plus(error0, own(joints[0], impulse0))
        error1 = plus(error1, response(joints[0], impulse0, joints[1]))
        return impulse1, impulse0, barrier(error1, go), barrier(error0, go)

    speeds = _rigid_body.MOTOR_SPEED
    first1, first0 = barrier((errors(1), errors(0)), go)
    impulse1, impulse0, error1, error0 = sweep(first1, first0, speeds)
    # the map: what it makes of 0 (the offset) and of the four unit errors
    shape = hull.x.shape
    unit = np.eye(5, dtype=np.float32).reshape(5, 5, *[1] * len(shape))
    unit = barrier(jnp.broadcast_to(unit, (5, 5, *shape)), go)
    zero = jnp.zeros((5, *shape), jnp.float32)
    only = unit[4]  # the motor's speed counts in the offset
    _, _, after1, after0 = sweep(
        (unit[0], unit[1], unit[2]), (unit[3], zero, zero), [s * only for s in speeds]
    )
    once = _Affine(stack(*after1, after0[0]))
    start = stack(*error1, error0[0])
    # power: of 2^i sweeps; total: the sum of the errors before each of them

    def double(i, carry):
        """Go on by 2^i sweeps if that is part of the number; then double the step."""
        power, total, state, summed = carry
        goes = ((num_sweeps - 1) >> i) & 1 == 1
        summed = jnp.where(goes, summed + total(state, go), summed)
        state = jnp.where(goes, power(state, go), state)
        total = _Affine(total.parts + total.after(power, go).parts)
        return power.after(power, go), total, state, summed

    carry = barrier((once, _Affine(unit[:4]), start, jnp.zeros_like(start)), go)
    carry = jax.lax.fori_loop(0, (num_sweeps - 1).bit_length(), double, carry)
    summed = barrier(carry[3], go)

    n = np.float32(num_sweeps - 1)
    sum1 = (summed[0], summed[1], summed[2])
    more1 = solve(1, sum1, n * speeds[1])
    sum0 = plus((summed[3], 0.0, 0.0), response(joints[1], more1, joints[0]))
    more0 = solve(0, sum0, n * speeds[0])
    change = {1: barrier(plus(impulse1, more1), go), 0: barrier(plus(impulse0, more0), go)}
    firsts = {1: impulse1, 0: impulse0}
    # what the motor saw in each sweep, summed
    seen1 = first1[0] + summed[0]
    through = response(joints[1], plus(impulse1, more1), joints[0])[0]
    seen0 = first0[0] + summed[3] + through
    met = {1: first1[0], 0: first0[0] + response(joints[1], impulse1, joints[0])[0]}
    seen = {1: seen1, 0: seen0}

    fine = jnp.ones(shape, bool)
    new = []
    most = _rigid_body.MAX_MOTOR_IMPULSE
    for j in (0, 1):
        old, joint = impulses[j], joints[j]
        turn, x, y = change[j]
        mass, speed = _rigid_body.MOTOR_MASS, speeds[j]
        # at the limit
        motor = jnp.clip(old.motor - mass * (seen[j] - num_sweeps * speed), -most, most)
        limit = old.limit + turn - (motor - old.motor)
        motor1 = jnp.clip(old.motor - mass * (met[j] - speed), -most, most)
        limit1 = old.limit + firsts[j][0] - (motor1 - old.motor)
        pushes = (joint.at * limit > 1e-4) & (joint.at * limit1 > 1e-4)
        # the motor goes one way only, or is far from its clamp
        steady = (jnp.abs(met[j]) < np.abs(speed)) | (jnp.abs(motor) < 0.9 * most)
        pushes = pushes & (joint.at * speed < 0.0) & steady
        # between the limits
        free = old.motor + turn
        unclamped = (jnp.abs(free) < 0.99 * most) & (jnp.abs(old.motor) < 0.99 * most)
        unclamped = unclamped & (jnp.abs(old.motor + firsts[j][0]) < 0.99 * most)
        fine = fine & jnp.where(is_at[j], pushes, unclamped)
        new.append(
            JointImpulse(
                motor=jnp.where(is_at[j], motor, free),
                x=old.x + x,
                y=old.y + y,
                limit=jnp.where(is_at[j], limit, 0.0),
            )
        )
    legs = list(legs)
    for j in (1, 0):
        turn, x, y = change[j]
        hull, legs[j] = _rigid_body.apply_joint(joints[j], hull, legs[j], x, y, turn)
    return hull, legs, new, fine


def air_step(
    world: World,
    terrain: Array,
    gravity: Array,
    force_x: Array,
    force_y: Array,
    torque: Array,
) -> tuple[World, Array]:
    """`full_step` for a lander in the air, 30 times cheaper; and what it lacks (...) int32.

    0: nothing. No part is or comes near the ground, no clamp of a joint is undecided, one position
    sweep is enough, and the lander is not about to fall asleep. 1: it does not apply. 2: neither,
    and a leg touches the ground or is about to, which makes the loops of `full_step` long.
    """
    go = always(terrain)
    hull_velocity = Velocity(
        world.hull_velocity.x + DT * (HULL_INV_MASS * force_x),
        world.hull_velocity.y + DT * (gravity + HULL_INV_MASS * force_y),
        world.hull_velocity.w + DT * (HULL_INV_INERTIA * torque),
    )
    legs_velocity = world.leg_velocity._replace(y=world.leg_velocity.y + (DT * gravity)[None])
    joint, impulse = _start_joints(world, go)
    hull_velocity, legs_velocity = _start_warm(joint, impulse, hull_velocity, legs_velocity, go)
    joints, legs, impulses = (
        [leg(both_legs, j) for j in (0, 1)] for both_legs in (joint, legs_velocity, impulse)
    )
    hull_velocity, legs, impulses, fine = _air_velocities(
        go, hull_velocity, legs, joints, impulses, EXACT.velocity_sweeps
    )
    hull_velocity, legs, impulses, fine = barrier((hull_velocity, legs, impulses, fine), go)

    hull, hull_velocity = _rigid_body.move(world.hull, hull_velocity, DT)
    legs_pose, legs_velocity = _rigid_body.move(world.leg, both(*legs), DT)
    hull, legs_pose = barrier((hull, legs_pose), go)
    poses = [leg(legs_pose, 0), leg(legs_pose, 1)]
    for j in (1, 0):
        hull, poses[j], ok = _rigid_body.correct_joint(hull, poses[j], joints[j].at, j)
        hull, poses[j] = barrier((hull, poses[j]), go)
        fine = fine & ok
    legs_pose = both(*poses)

    slow = _rigid_body.is_slow(legs_velocity)
    slow = slow[0] & slow[1] & _rigid_body.is_slow(hull_velocity)
    slow_steps = jnp.where(slow, world.slow_steps + 1, 0)
    box, moved = grow_boxes(world.box, world.leg, legs_pose)
    near = overlaps(box, terrain, edges_below(box)) & moved[None]
    near = jnp.any(near | (world.pairs.edge >= 0), axis=(0, 1))
    ground = jnp.maximum(_highest_under(world.hull, terrain), _highest_under(hull, terrain))
    near = near | (jnp.minimum(world.hull.y, hull.y) < ground + HULL_REACH)
    fine = fine & ~near & (slow_steps < SLEEP_STEPS) & world.awake
    tight = stack(*leg_boxes(legs_pose))
    busy = overlaps(tight, terrain, edges_below(tight), NEAR) | world.pairs.touching
    lacking = jnp.where(fine, 0, jnp.where(jnp.any(busy, axis=(0, 1)), 2, 1))
    return (
        World(
            hull=hull,
            leg=legs_pose,
            hull_velocity=hull_velocity,
            leg_velocity=legs_velocity,
            joint=both(*impulses),
            pairs=world.pairs,
            box=box,
            slow_steps=slow_steps,
            flag=world.flag,
            game_over=world.game_over,
            awake=world.awake,
        ),
        lacking.astype(jnp.int32),
    )


def _highest_under(pose: Pose, terrain: Array) -> Array:
    """Height [m] of the highest ground under a hull at a pose."""
    edge = _hull_edges(pose, terrain)
    return jnp.maximum(edge.y1, edge.y2).max(axis=0)


CHUNK = 32  # lanes that are solved in full together, at least; and a batch's share


def _by_type(leaves: list) -> list[int]:
    """Their order in `_pack`: those of a type together, so that they are converted at once."""
    return sorted(range(len(leaves)), key=lambda i: str(leaves[i].dtype))


def _pack(arrays: Any) -> Array:
    """Leaves (..., lanes) as rows (F, lanes) of float32: integers here are small."""
    leaves = jax.tree.leaves(arrays)
    of_type = {}
    for i in _by_type(leaves):
        rows = leaves[i].reshape(-1, leaves[i].shape[-1])
        of_type.setdefault(str(rows.dtype), []).append(rows)
    blocks = [jnp.concatenate(rows) for rows in of_type.values()]
    return jnp.concatenate([block.astype(jnp.float32) for block in blocks])


def _unpack(rows: Array, like: Any) -> Any:
    """The inverse of `_pack`: rows (F, ...) as pytree; like: the leaves of one scene."""
    leaves, treedef = jax.tree.flatten(like)
    num = [leaf.size for leaf in leaves]
    blocks, taken = {}, 0
    for name, dtype in sorted({str(leaf.dtype): leaf.dtype for leaf in leaves}.items()):
        size = sum(n for n, leaf in zip(num, leaves, strict=True) if leaf.dtype == dtype)
        blocks[name] = rows[taken : taken + size].astype(dtype)
        taken += size
    out, used = list(leaves), dict.fromkeys(blocks, 0)
    for i in _by_type(leaves):
        name, shape = str(leaves[i].dtype), leaves[i].shape
        part = blocks[name][used[name] : used[name] + num[i]]
        out[i] = part.reshape(*shape, *rows.shape[1:])
        used[name] += num[i]
    return jax.tree.unflatten(treedef, out)


@functools.cache
def _make_step(solver: Solver) -> Callable[..., Array]:
    """The step of many scenes, (..., lanes): cheap for those in the air, in full for the others.

    It returns a packed world: one array to lay out anew instead of thirty.
    """

    @jax.custom_batching.custom_vmap
    def step(*args):
        go = always(args[1])
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[:-1], leaf.dtype), args)
        before = barrier(_pack(args), go)
        air, lacking = barrier(air_step(*_unpack(before, like)), go)
        num_lanes = lacking.shape[0]
        size = min(max(num_lanes // CHUNK // 8 * 8, CHUNK), num_lanes)
        order = jnp.argsort(-lacking)  # those alike together: a chunk waits for its slowest
        num_left = jnp.sum(lacking > 0)

        def is_running(carry):
            return carry[0] < num_left

        def some(carry):
            first, after = carry
            # the last chunk overlaps the one before, or lanes that need it not: to no harm
            index = jax.lax.dynamic_slice(order, [first], [size])
            lanes = barrier(before.at[:, index].get(mode="promise_in_bounds"), go)
            full = full_step(*_unpack(lanes, like), solver=solver)
            rows = barrier(_pack(full), go)
            rows = jnp.where(lacking[index] > 0, rows, after[:, index])
            after = after.at[:, index].set(rows, mode="promise_in_bounds", unique_indices=True)
            return first + size, after

        carry = (jnp.int32(0), barrier(_pack(air), go))
        return jax.lax.while_loop(is_running, some, carry)[1]

    def all_batched(axis_size, in_batched, args):
        def batched(leaf, is_batched):
            return leaf if is_batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape))

        return jax.tree.map(batched, args, tuple(in_batched))

    @step.def_vmap
    def more_lanes(axis_size, in_batched, *args):
        def flat(leaf):
            leaf = jnp.moveaxis(leaf, 0, -2)
            return leaf.reshape(*leaf.shape[:-2], -1)

        out = step(*jax.tree.map(flat, all_batched(axis_size, in_batched, args)))
        return jnp.moveaxis(out.reshape(len(out), axis_size, -1), 1, 0), True

    @jax.custom_batching.custom_vmap
    def single(*args):
        return step(*jax.tree.map(lambda leaf: leaf[..., None], args))[..., 0]

    @single.def_vmap
    def lanes(axis_size, in_batched, *args):
        args = all_batched(axis_size, in_batched, args)
        return step(*jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), args)).T, True

    return single


def step(
    world: World,
    terrain: Array,
    gravity: Array,
    force_x: Array,
    force_y: Array,
    torque: Array,
    solver: Solver = EXACT,
) -> World:
    """One step of 0.02 s of one scene; `jax.vmap` makes it many.

    world: its arrays without lanes; terrain: heights (11,) [m] at x = 0, 2, ..., 20; gravity ()
    [m/s^2], negative: downward; force () [N] and torque () [N m] on the hull.

    Under `vmap` all scenes take `air_step`. Those for which that does not do are gathered, some at
    a time, and take `full_step`: a batch pays for contacts by the number of landers that are near
    the ground.
    """
    args = (terrain, gravity, force_x, force_y, torque)
    args = tuple(jnp.asarray(a, jnp.float32) for a in args)
    return _unpack(_make_step(solver)(world, *args), world)
