"""The lander's physics, piece by piece: joints, contacts, continuous collision, the two paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.envs import _contacts, _lander_start, _lander_world, _rigid_body
from jaxrl.envs._contacts import LEG_VERTICES, ContactImpulse, Edge
from jaxrl.envs._rigid_body import JointImpulse, Pose, Velocity

HULL_MASS, LEG_MASS = 4.816666603, 0.0711111
NUM = 64  # one shape for all, so that programs are compiled once
FLAT = jnp.full((11, NUM), 3.3)
ZERO = jnp.zeros(NUM)
GRAVITY = jnp.full(NUM, -10.0)


@pytest.fixture(scope="module")
def full():
    """`full_step` of NUM lanes: world, force x, y, torque, gravity."""
    run = jax.jit(_lander_world.full_step)
    return lambda world, fx=ZERO, fy=ZERO, torque=ZERO, gravity=GRAVITY: jax.device_get(
        run(world, FLAT, gravity, fx, fy, torque)
    )


@pytest.fixture(scope="module")
def air():
    run = jax.jit(_lander_world.air_step)
    return lambda world: jax.device_get(run(world, FLAT, GRAVITY, ZERO, ZERO, ZERO))


def lanes(tree):
    return jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a)[..., None], NUM, axis=-1), tree)


@pytest.fixture(scope="module")
def pushed(full):
    """NUM landers after the reset's own step, taken in full, and their pushes and torques."""
    rng = np.random.default_rng(0)
    fx, fy = rng.uniform(-1000, 1000, (2, NUM)).astype(np.float32)
    torque = rng.uniform(-1.5, 1.5, NUM).astype(np.float32)
    gravity = rng.uniform(-12, -1, NUM).astype(np.float32)
    world = full(lanes(_lander_start.at_creation()), fx, fy, torque, gravity)
    return world, fx, fy, torque, gravity


def test_the_table_of_the_start_is_the_step(pushed):
    world, fx, fy, torque, gravity = pushed
    ours = jax.vmap(_lander_start.after_first_step, out_axes=-1)(gravity, fx, fy, torque)
    for name, tolerance in (
        ("hull", 1e-5),
        ("hull_velocity", 1.5e-5),
        ("leg", 1e-5),
        ("leg_velocity", 3e-5),
    ):
        for a, b in zip(getattr(ours, name), getattr(world, name), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(ours.box, world.box, rtol=0, atol=2e-5)
    np.testing.assert_allclose(ours.joint.x, world.joint.x, rtol=0, atol=5e-6)
    np.testing.assert_allclose(ours.joint.y, world.joint.y, rtol=0, atol=5e-6)
    ours, theirs = (w.joint.motor + w.joint.limit for w in (ours, world))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


def test_the_cheap_step_in_the_air_is_the_full_one(pushed, full, air):
    world = pushed[0]
    num_fine = 0
    for i in range(60):  # the legs swing, reach their limits, and the motors saturate
        exact = full(world)
        cheap, lacking = air(world)
        fine = lacking == 0
        for name in ("hull", "leg", "hull_velocity", "leg_velocity", "joint"):
            for a, b in zip(getattr(cheap, name), getattr(exact, name), strict=True):
                np.testing.assert_allclose(a[..., fine], b[..., fine], rtol=0, atol=1e-4)
        num_fine += fine.sum()
        assert fine.mean() > 0.5, i
        world = exact
    assert num_fine > 0.9 * 60 * NUM
    # 40 N m * 0.02 s, which most motors have reached against the limit by now
    assert np.median(world.joint.motor[0]) == pytest.approx(-0.8)
    assert np.abs(world.joint.motor).max() <= 0.8 + 1e-6


def test_momentum_is_that_of_gravity(pushed, full):
    world = pushed[0]
    after = full(world)
    for axis, gain in (("x", 0.0), ("y", -0.2)):
        hull = getattr(after.hull_velocity, axis) - getattr(world.hull_velocity, axis)
        legs = getattr(after.leg_velocity, axis) - getattr(world.leg_velocity, axis)
        momentum = HULL_MASS * hull + LEG_MASS * legs.sum(axis=0)
        np.testing.assert_allclose(momentum, gain * (HULL_MASS + 2 * LEG_MASS), atol=1e-4)


def test_a_joint_sweep_closes_the_anchor():
    at = _rigid_body.make_joint(jnp.float32(0.1), jnp.float32(0.55), 0)
    assert at.at == 0  # 0.55 - 0.1 + 0.05 = 0.5 rad, between 0.4 and 0.9
    hull, leg = Velocity(1.0, 2.0, 0.3), Velocity(-1.0, 0.5, 2.0)
    zero = jnp.float32(0.0)
    change = _rigid_body.solve_joint(at, hull, leg, JointImpulse(zero, zero, zero, zero), 0)
    hull, leg = _rigid_body.apply_change(at, hull, leg, change)
    # both bodies' velocities of the anchor are equal
    assert float(leg.x - leg.w * at.rby) == pytest.approx(float(hull.x - hull.w * at.ray), abs=1e-5)
    assert float(leg.y + leg.w * at.rbx) == pytest.approx(float(hull.y + hull.w * at.rax), abs=1e-5)
    # before, the motor wanted -0.3 rad/s: 2.0 - 0.3 + 0.3 = 2 rad/s too fast
    assert float(change.motor) == pytest.approx(-2.0 / (1.27570426 + 558.36380), rel=1e-5)


def test_a_limit_only_pushes():
    at = _rigid_body.make_joint(jnp.float32(0.0), jnp.float32(0.34), 0)
    assert at.at == 1  # 0.34 + 0.05 < 0.4 rad
    zero = jnp.float32(0.0)
    # the motor, at its clamp, can turn the leg no faster towards the limit
    still = JointImpulse(jnp.float32(-0.8), zero, zero, zero)
    for w, wanted in ((-3.0, "pushes"), (3.0, "lets go")):
        hull, leg = Velocity(zero, zero, zero), Velocity(zero, zero, jnp.float32(w))
        change = _rigid_body.solve_joint(at, hull, leg, still, 0)
        _, after = _rigid_body.apply_change(at, hull, leg, change)
        if wanted == "pushes":
            assert change.limit > 0
            assert float(after.w) == pytest.approx(0.0, abs=0.1)
        else:
            assert change.limit == 0
            assert after.w > 0


def test_correcting_a_joint_halves_nothing_it_closes_the_gap():
    hull, leg = Pose(*jnp.asarray([10.0, 8.0, 0.0])), Pose(*jnp.asarray([10.83, 7.75, 0.45]))
    gaps = []
    for _ in range(3):
        rax, ray, rbx, rby = _rigid_body.anchors(hull.a, leg.a, 0)
        gaps.append(np.hypot(leg.x + rbx - hull.x - rax, leg.y + rby - hull.y - ray))
        hull, leg, fine = _rigid_body.correct_joint(hull, leg, jnp.float32(0.0), 0)
    assert gaps[0] > 0.02
    assert gaps[2] < 1e-4
    assert fine


def standing(height, angle=0.0):
    """A leg over flat ground at y = 3.3 m, its middle `height` above; and the edge."""
    edge = Edge(*(jnp.float32(a) for a in (8.0, 3.3, 10.0, 3.3)))
    return edge, Pose(jnp.float32(9.0), jnp.float32(3.3 + height), jnp.float32(angle))


def test_manifold_of_an_upright_leg():
    # the leg is 16/30 m long: its foot is 0.01 m above the ground, less than the skins' 0.02 m
    edge, pose = standing(8 / 30 + 0.01)
    manifold = _contacts.collide(edge, pose, LEG_VERTICES)
    nx, ny, qx, _, separation = _contacts.world_points(manifold, pose)
    np.testing.assert_array_equal(manifold.valid, [True, True])
    assert (nx, ny) == pytest.approx((0.0, 1.0), abs=1e-6)  # away from the ground
    np.testing.assert_allclose(sorted(qx), [9 - 2 / 30, 9 + 2 / 30], atol=1e-6)
    np.testing.assert_allclose(separation, 0.01, atol=1e-6)
    edge, pose = standing(8 / 30 + 0.021)
    assert not _contacts.collide(edge, pose, LEG_VERTICES).valid.any()
    # leaning by 0.2 rad only one corner is near
    low = 8 / 30 * np.cos(0.2) + 2 / 30 * np.sin(0.2)
    edge, pose = standing(low + 0.01, 0.2)
    np.testing.assert_array_equal(_contacts.collide(edge, pose, LEG_VERTICES).valid, [True, False])


def test_a_contact_stops_a_foot_and_friction_is_bounded():
    edge, pose = standing(8 / 30 + 0.01)
    contact = _contacts.make_contact(_contacts.collide(edge, pose, LEG_VERTICES), pose)
    assert contact.is_block
    velocity = Velocity(*(jnp.float32(a) for a in (2.0, -1.0, 0.0)))
    impulse = ContactImpulse(jnp.zeros(2), jnp.zeros(2))
    for _ in range(2):
        new = _contacts.solve_contact(contact, velocity, impulse)
        velocity = _contacts.apply_contact(
            contact, velocity, new.normal - impulse.normal, new.tangent - impulse.tangent
        )
        before, impulse = impulse, new
    # stopped: m v = 0.0711 * 1 N s; friction of the second sweep: at most sqrt(0.2 * 0.1) of it
    assert impulse.normal.sum() == pytest.approx(LEG_MASS, rel=0.2)
    most = np.sqrt(0.02) * before.normal
    assert (np.abs(impulse.tangent) <= most + 1e-6).all()
    assert impulse.tangent.sum() < 0  # n turned clockwise points to +x, where it slides
    corners = velocity.y + velocity.w * contact.rx
    np.testing.assert_allclose(corners, 0.0, atol=1e-5)


def test_time_of_impact_of_a_falling_leg():
    edge, pose = standing(8 / 30 + 0.105)
    end = pose._replace(y=pose.y - 0.2)
    t, hit = _contacts.time_of_impact(edge, pose, end, LEG_VERTICES, jnp.bool_(True))
    assert hit
    assert 0.105 - 0.2 * t == pytest.approx(0.005, abs=0.00126)  # Box2D's target and tolerance
    _, hit = _contacts.time_of_impact(
        edge, pose, pose._replace(y=pose.y - 0.09), LEG_VERTICES, jnp.bool_(True)
    )
    assert not hit


def test_distances_by_hand():
    edge, pose = standing(8 / 30 + 0.3)
    assert _contacts.closest(edge, pose, LEG_VERTICES).distance == pytest.approx(0.3, abs=1e-6)
    # beside the end of the edge, at (10, 3.3): 0.3 m to the right of it and 0.4 m above
    right = pose._replace(x=jnp.float32(10.3 + 2 / 30), y=jnp.float32(3.7 + 8 / 30))
    found = _contacts.closest(edge, right, LEG_VERTICES)
    assert found.distance == pytest.approx(0.5, abs=1e-5)
    assert (found.nx, found.ny) == pytest.approx((0.6, 0.8), abs=1e-5)
    inside = pose._replace(y=jnp.float32(3.3))
    assert _contacts.closest(edge, inside, LEG_VERTICES).distance == 0


@pytest.mark.parametrize(
    ("speed", "turn", "slow"), [(0.0099, 0.0, True), (0.0101, 0.0, False), (0.0, 0.0351, False)]
)
def test_what_counts_as_slow(speed, turn, slow):
    velocity = Velocity(jnp.float32(speed), jnp.float32(0.0), jnp.float32(turn))
    assert _rigid_body.is_slow(velocity) == slow


def test_the_listener_forgets_a_leg_that_crosses_to_the_next_edge():
    """The newest pair is heard of first: it begins, then the old one ends, and the flag is off."""
    pairs = _lander_world.no_pairs(())
    pairs = pairs._replace(
        edge=jnp.asarray([[5, 5], [4, 4]]), touching=jnp.asarray([[False, True], [True, False]])
    )
    pose = Pose(jnp.full((2, 2), 9.0), jnp.full((2, 2), 3.577), jnp.zeros((2, 2)))
    one = jnp.ones((2, 2))
    edge = Edge(8.0 * one, 3.3 * one, 10.0 * one, 3.3 * one)
    manifold = _contacts.collide(edge, pose, LEG_VERTICES)
    # leg 0 touches only edge 5 (slot 0) now, leg 1 only edge 4 (slot 1)
    manifold = manifold._replace(valid=jnp.asarray([[[True, False], [False, True]]] * 2))
    flag = jnp.asarray([True, True])
    after, flag = _lander_world._update(pairs, manifold, jnp.ones((2, 2), bool), flag)
    np.testing.assert_array_equal(after.touching, [[True, False], [False, True]])
    # leg 0: begin on 5, end on 4: off, though it stands on 5. leg 1: end on 5, begin on 4: on
    np.testing.assert_array_equal(flag, [False, True])
