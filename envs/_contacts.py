"""A leg or the hull against the ground: manifolds, contact impulses, continuous collision.

The ground is a row of edges, each an array of end points; shapes touch when their cores are within
0.02 m, twice the skin. Conventions and units as in `_rigid_body`; the algorithms are Box2D 2.3's
(Erin Catto, https://box2d.org, zlib licence): `b2CollideEdge`, `b2ContactSolver`,
`b2TimeOfImpact`. Everything is elementwise: any trailing axes, all arrays alike.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._rigid_body import (
    LEG_INV_INERTIA,
    LEG_INV_MASS,
    LINEAR_SLOP,
    Pose,
    Velocity,
    barrier,
    stack,
)

Array = Any

SKIN = np.float32(0.02)  # [m] of edge and polygon together
FRICTION = np.float32(np.sqrt(np.float32(0.2) * np.float32(0.1)))  # of a leg on the terrain
TOI_TARGET = np.float32(0.005)  # [m] between the cores at the time of impact
TOI_TOLERANCE = np.float32(0.00125)
MAX_CORRECTION = np.float32(0.2)  # [m]

# Polygons in the frame of their centre of mass, counter-clockwise; normal i belongs to the face
# from vertex i to vertex i + 1.
LEG_VERTICES = np.array([(-2, -8), (2, -8), (2, 8), (-2, 8)], np.float32) / np.float32(30.0)
HULL_VERTICES = np.array(
    [(17, -10), (17, 0), (14, 17), (-14, 17), (-17, 0), (-17, -10)], np.float32
) / np.float32(30.0) - np.array([0.0, 0.1013071910], np.float32)


def normals(vertices: np.ndarray) -> np.ndarray:
    """Outward unit normals (n, 2) of a counter-clockwise polygon (n, 2)."""
    along = np.roll(vertices, -1, axis=0) - vertices
    outward = np.stack([along[:, 1], -along[:, 0]], axis=1)
    return (outward / np.linalg.norm(outward, axis=1, keepdims=True)).astype(np.float32)


class Edge(NamedTuple):
    """A piece of ground from (x1, y1) to (x2, y2) [m], x1 < x2."""

    x1: Array
    y1: Array
    x2: Array
    y2: Array


class Manifold(NamedTuple):
    """Where an edge and a polygon touch: up to two points, `valid` (2, ...) bool.

    face: the reference face belongs to the polygon (else to the edge). n: its outward normal and
    p: a point on it; q: the clipped points (2, ...). Of these, what belongs to the polygon is given
    in its frame, what belongs to the edge in the world. key: feature ids (2, ...) int32.
    """

    face: Array
    nx: Array
    ny: Array
    px: Array
    py: Array
    qx: Array
    qy: Array
    key: Array
    valid: Array


class Contact(NamedTuple):
    """What the velocity sweeps of one contact need; r, masses: (2, ...) for the two points.

    n: unit normal from the ground. is_block: two points, solved together. k: their matrix (with 1
    and 2), i: its inverse.
    """

    nx: Array
    ny: Array
    rx: Array
    ry: Array
    normal_mass: Array
    tangent_mass: Array
    is_block: Array
    k11: Array
    k12: Array
    k22: Array
    i11: Array
    i12: Array
    i22: Array


class ContactImpulse(NamedTuple):
    """Accumulated impulses [N s] of two points, (2, ...) each."""

    normal: Array
    tangent: Array


def _select(index: Array, values: Array) -> Array:
    """values[index] (n, ...) -> (...), without a gather."""
    chosen = values[0]
    for i in range(1, len(values)):
        chosen = jnp.where(index == i, values[i], chosen)
    return chosen


def _largest(values: Array) -> tuple[Array, Array]:
    """The largest of values (n, ...) and the index of the first that is as large."""
    best, index = values[0], jnp.zeros(values.shape[1:], jnp.int32)
    for i in range(1, len(values)):
        better = values[i] > best
        best = jnp.where(better, values[i], best)
        index = jnp.where(better, i, index)
    return best, index


def _corners(points: np.ndarray, pose: Pose, *, rotate: bool = False) -> tuple[Array, Array]:
    """Points (n, 2) of a polygon's frame in the world, x and y (n, ...); rotate: directions."""
    shape = (len(points),) + (1,) * pose.a.ndim
    x, y = (jnp.asarray(points[:, i]).reshape(shape) for i in (0, 1))
    sin, cos = jnp.sin(pose.a)[None], jnp.cos(pose.a)[None]
    wx, wy = cos * x - sin * y, sin * x + cos * y
    return (wx, wy) if rotate else (wx + pose.x[None], wy + pose.y[None])


def collide(edge: Edge, pose: Pose, vertices: np.ndarray, go: Array | None = None) -> Manifold:
    """The manifold of an edge and a polygon (vertices (n, 2) about its centre of mass)."""
    outward = normals(vertices)
    sin, cos = jnp.sin(pose.a), jnp.cos(pose.a)
    vx, vy = _corners(vertices, pose)
    nx, ny = _corners(outward, pose, rotate=True)
    ex, ey = edge.x2 - edge.x1, edge.y2 - edge.y1
    length = jnp.sqrt(ex * ex + ey * ey)
    ex, ey = ex / length, ey / length
    # the side of the edge on which the polygon's middle lies
    is_front = ey * (pose.x - edge.x1) - ex * (pose.y - edge.y1) >= 0.0
    sign = jnp.where(is_front, 1.0, -1.0).astype(jnp.float32)
    enx, eny = sign * ey, -sign * ex
    vx, vy, nx, ny, enx, eny = barrier((vx, vy, nx, ny, enx, eny), go)

    x1, y1, x2, y2 = (a[None] for a in edge)
    edge_separation = (enx[None] * (vx - x1) + eny[None] * (vy - y1)).min(axis=0)
    from_face = jnp.minimum(nx * (x1 - vx) + ny * (y1 - vy), nx * (x2 - vx) + ny * (y2 - vy))
    # the face of the polygon that looks most against the edge
    against = -(enx[None] * nx + eny[None] * ny)
    from_face, against = barrier((from_face, against), go)
    face_separation, face_index = _largest(from_face)
    _, incident = _largest(against)
    near = (edge_separation <= SKIN) & (face_separation <= SKIN)
    face = face_separation > np.float32(0.98) * edge_separation + np.float32(0.001)

    i1 = jnp.where(face, face_index, incident)
    i2 = jnp.where(i1 + 1 < len(vertices), i1 + 1, 0)
    ax, ay, bx, by = _select(i1, vx), _select(i1, vy), _select(i2, vx), _select(i2, vy)
    i1, i2, ax, ay, bx, by, face, near = barrier((i1, i2, ax, ay, bx, by, face, near), go)
    e1x = jnp.where(is_front, edge.x1, edge.x2)  # reference end points
    e1y = jnp.where(is_front, edge.y1, edge.y2)
    e2x = jnp.where(is_front, edge.x2, edge.x1)
    e2y = jnp.where(is_front, edge.y2, edge.y1)
    ref_nx = jnp.where(face, _select(i1, nx), enx)
    ref_ny = jnp.where(face, _select(i1, ny), eny)
    r1x, r1y = jnp.where(face, ax, e1x), jnp.where(face, ay, e1y)
    r2x, r2y = jnp.where(face, bx, e2x), jnp.where(face, by, e2y)
    r1 = jnp.where(face, i1, jnp.where(is_front, 0, 1))
    r2 = jnp.where(face, i2, jnp.where(is_front, 1, 0))

    # incident segment; key = indexA + 8 indexB + 64 typeA + 128 typeB, types: 0 vertex, 1 face
    px, py = jnp.where(face, edge.x1, ax), jnp.where(face, edge.y1, ay)
    qx, qy = jnp.where(face, edge.x2, bx), jnp.where(face, edge.y2, by)
    pb, qb = i1, jnp.where(face, i1, i2)  # indexB of both
    p_key = jnp.where(face, 8 * pb + 128, 8 * pb + 64)  # indexA is 0
    q_key = jnp.where(face, 8 * qb + 128, 8 * qb + 64)

    def clip(px, py, p_key, pb, qx, qy, q_key, qb, sx, sy, offset, index):
        d0, d1 = sx * px + sy * py - offset, sx * qx + sy * qy - offset
        in0, in1 = d0 <= 0.0, d1 <= 0.0
        crosses = d0 * d1 < 0.0
        t = d0 / jnp.where(crosses, d0 - d1, 1.0)
        cx, cy = px + t * (qx - px), py + t * (qy - py)
        c_key = index + 8 * pb + 128
        ok = (in0 & in1) | crosses
        # out of order as Box2D: the points that are inside, then the crossing
        first = (
            jnp.where(in0, px, qx),
            jnp.where(in0, py, qy),
            jnp.where(in0, p_key, q_key),
            jnp.where(in0, pb, qb),
        )
        is_both = in0 & in1
        second = (
            jnp.where(is_both, qx, cx),
            jnp.where(is_both, qy, cy),
            jnp.where(is_both, q_key, c_key),
            jnp.where(is_both, qb, pb),
        )
        return first, second, ok

    sx, sy = ref_ny, -ref_nx
    px, py, qx, qy, sx, sy = barrier((px, py, qx, qy, sx, sy), go)
    (px, py, p_key, pb), (qx, qy, q_key, qb), ok1 = clip(
        px, py, p_key, pb, qx, qy, q_key, qb, sx, sy, sx * r1x + sy * r1y, r1
    )
    px, py, p_key, pb, qx, qy, q_key, qb, ok1 = barrier(
        (px, py, p_key, pb, qx, qy, q_key, qb, ok1), go
    )
    (px, py, p_key, _), (qx, qy, q_key, _), ok2 = clip(
        px, py, p_key, pb, qx, qy, q_key, qb, -sx, -sy, -sx * r2x - sy * r2y, r2
    )
    px, py, p_key, qx, qy, q_key, ok2 = barrier((px, py, p_key, qx, qy, q_key, ok2), go)
    ok = near & ok1 & ok2
    p_sep = ref_nx * (px - r1x) + ref_ny * (py - r1y)
    q_sep = ref_nx * (qx - r1x) + ref_ny * (qy - r1y)
    p_valid, q_valid = ok & (p_sep <= SKIN), ok & (q_sep <= SKIN)

    def swapped(key):  # Box2D exchanges A and B where the face is the polygon's
        a, b, kind_a, kind_b = key & 7, (key >> 3) & 7, (key >> 6) & 1, key >> 7
        return jnp.where(face, b + 8 * a + 64 * kind_b + 128 * kind_a, key)

    p_key, q_key = swapped(p_key), swapped(q_key)

    def to_polygon(x, y):
        x, y = x - pose.x, y - pose.y
        return cos * x + sin * y, cos * y - sin * x

    plx, ply = to_polygon(px, py)
    qlx, qly = to_polygon(qx, qy)
    px, py = jnp.where(face, px, plx), jnp.where(face, py, ply)
    qx, qy = jnp.where(face, qx, qlx), jnp.where(face, qy, qly)
    constants = np.concatenate([outward, vertices], axis=1).T.reshape(4, -1, *[1] * face.ndim)
    local_nx, local_ny, local_px, local_py = (_select(i1, jnp.asarray(c)) for c in constants)
    return Manifold(
        face=face,
        nx=jnp.where(face, local_nx, enx),
        ny=jnp.where(face, local_ny, eny),
        px=jnp.where(face, local_px, e1x),
        py=jnp.where(face, local_py, e1y),
        # the second point moves up if the first is too far
        qx=stack(jnp.where(p_valid, px, qx), qx),
        qy=stack(jnp.where(p_valid, py, qy), qy),
        key=stack(jnp.where(p_valid, p_key, q_key), q_key),
        valid=stack(p_valid | q_valid, p_valid & q_valid),
    )


def inherit(
    manifold: Manifold, old_key: Array, old_valid: Array, old: ContactImpulse
) -> ContactImpulse:
    """The impulses of the old points with the same feature ids, 0 for new points; (2, ...)."""
    same0 = old_valid[:1] & (manifold.key == old_key[:1])
    same1 = old_valid[1:] & (manifold.key == old_key[1:])

    def of(impulse):
        kept = jnp.where(same0, impulse[:1], jnp.where(same1, impulse[1:], 0.0))
        return jnp.where(manifold.valid, kept, 0.0)

    return ContactImpulse(of(old.normal), of(old.tangent))


def world_points(manifold: Manifold, pose: Pose) -> tuple[Array, Array, Array, Array, Array]:
    """Normal (x, y) from the ground, (...), clip points (x, y) and their core separations (2, ...).

    All in the world, for the polygon at a pose [m, rad]. Of one point of a manifold: all (...).
    """
    face = manifold.face
    sin, cos = jnp.sin(pose.a), jnp.cos(pose.a)
    nx = jnp.where(face, cos * manifold.nx - sin * manifold.ny, manifold.nx)
    ny = jnp.where(face, sin * manifold.nx + cos * manifold.ny, manifold.ny)
    px = jnp.where(face, cos * manifold.px - sin * manifold.py + pose.x, manifold.px)
    py = jnp.where(face, sin * manifold.px + cos * manifold.py + pose.y, manifold.py)
    qx, qy = manifold.qx, manifold.qy
    sign = jnp.where(face, -1.0, 1.0).astype(jnp.float32)
    normal = sign * nx, sign * ny
    of_points = (None,) * (qx.ndim - face.ndim)
    x, y, face, sin, cos, nx, ny, px, py = (
        a[of_points] for a in (pose.x, pose.y, face, sin, cos, nx, ny, px, py)
    )
    qx, qy = (
        jnp.where(face, qx, cos * qx - sin * qy + x),
        jnp.where(face, qy, sin * qx + cos * qy + y),
    )
    return *normal, qx, qy, nx * (qx - px) + ny * (qy - py)


def make_contact(manifold: Manifold, pose: Pose) -> Contact:
    """Prepare the velocity sweeps of a leg's contact at a pose."""
    nx, ny, qx, qy, separation = world_points(manifold, pose)
    # the middle between both skins; towards the ground, whoever owns the face
    rx = qx - jnp.where(manifold.face, -0.5, 0.5)[None] * separation * nx[None] - pose.x[None]
    ry = qy - jnp.where(manifold.face, -0.5, 0.5)[None] * separation * ny[None] - pose.y[None]
    m, i = LEG_INV_MASS, LEG_INV_INERTIA
    rn = rx * ny[None] - ry * nx[None]
    rt = -rx * nx[None] - ry * ny[None]  # tangent: (ny, -nx)
    k = m + i * rn * rn
    k12 = m + i * rn[0] * rn[1]
    det = k[0] * k[1] - k12 * k12
    is_good = k[0] * k[0] < 1000.0 * det
    is_block = manifold.valid[1] & is_good
    valid = stack(manifold.valid[0], is_block)
    inv_det = jnp.where(is_block, 1.0 / jnp.where(is_good, det, 1.0), 0.0)
    return Contact(
        nx=nx,
        ny=ny,
        rx=rx,
        ry=ry,
        normal_mass=jnp.where(valid, 1.0 / k, 0.0),
        tangent_mass=jnp.where(valid, 1.0 / (m + i * rt * rt), 0.0),
        is_block=is_block,
        k11=k[0],
        k12=k12,
        k22=k[1],
        i11=k[1] * inv_det,
        i12=-k12 * inv_det,
        i22=k[0] * inv_det,
    )


def apply_contact(
    contact: Contact, velocity: Velocity, normal: Array, tangent: Array, points: tuple = (0, 1)
) -> Velocity:
    """Velocity of a leg after impulses [N s] (2, ...) at the points of a contact."""
    vx, vy, w = velocity
    for p in points:
        px = normal[p] * contact.nx + tangent[p] * contact.ny
        py = normal[p] * contact.ny - tangent[p] * contact.nx
        vx = vx + LEG_INV_MASS * px
        vy = vy + LEG_INV_MASS * py
        w = w + LEG_INV_INERTIA * (contact.rx[p] * py - contact.ry[p] * px)
    return Velocity(vx, vy, w)


def solve_contact(contact: Contact, velocity: Velocity, impulse: ContactImpulse) -> ContactImpulse:
    """One sweep over one contact of a leg: the accumulated impulses after it.

    Friction first, point after point, bounded by the normal impulses of before; then the normal
    impulses, two of them by trying the four cases of their complementarity problem.
    """
    nx, ny, rx, ry = contact.nx, contact.ny, contact.rx, contact.ry
    m, i = LEG_INV_MASS, LEG_INV_INERTIA
    vx, vy, w = velocity
    tangents = []
    for p in (0, 1):
        vt = (vx - w * ry[p]) * ny - (vy + w * rx[p]) * nx
        most = FRICTION * impulse.normal[p]
        new = jnp.clip(impulse.tangent[p] - contact.tangent_mass[p] * vt, -most, most)
        # a point that is not solved keeps what it has
        new = jnp.where(contact.tangent_mass[p] > 0, new, impulse.tangent[p])
        tangents.append(new)
        d = new - impulse.tangent[p]
        vx, vy = vx + m * d * ny, vy - m * d * nx
        w = w - i * d * (rx[p] * nx + ry[p] * ny)

    a0, a1 = impulse.normal[0], impulse.normal[1]
    vn0 = (vx - w * ry[0]) * nx + (vy + w * rx[0]) * ny
    vn1 = (vx - w * ry[1]) * nx + (vy + w * rx[1]) * ny
    single = jnp.maximum(a0 - contact.normal_mass[0] * vn0, 0.0)
    b0 = vn0 - (contact.k11 * a0 + contact.k12 * a1)
    b1 = vn1 - (contact.k12 * a0 + contact.k22 * a1)
    x0, x1 = -(contact.i11 * b0 + contact.i12 * b1), -(contact.i12 * b0 + contact.i22 * b1)
    only0, only1 = -contact.normal_mass[0] * b0, -contact.normal_mass[1] * b1
    is1 = (x0 >= 0.0) & (x1 >= 0.0)
    is2 = (only0 >= 0.0) & (contact.k12 * only0 + b1 >= 0.0)
    is3 = (only1 >= 0.0) & (contact.k12 * only1 + b0 >= 0.0)
    is4 = (b0 >= 0.0) & (b1 >= 0.0)
    n0 = jnp.where(is1, x0, jnp.where(is2, only0, jnp.where(is3, 0.0, jnp.where(is4, 0.0, a0))))
    n1 = jnp.where(is1, x1, jnp.where(is2, 0.0, jnp.where(is3, only1, jnp.where(is4, 0.0, a1))))
    n0 = jnp.where(contact.is_block, n0, single)
    n1 = jnp.where(contact.is_block, n1, a1)
    return ContactImpulse(stack(n0, n1), stack(*tangents))


def correct_contact(point: Manifold, pose: Pose, factor: Array) -> tuple[Pose, Array]:
    """One position sweep over a leg's contact: the pose after it, the separation before it.

    point: one of a manifold's two, without their axis; what does not exist is apart by 0. factor:
    the part of the penetration that is corrected, 0.2; 0.75 in continuous collision.
    """
    nx, ny, qx, qy, separation = world_points(point, pose)
    separation = separation - SKIN
    excess = jnp.clip(factor * (separation + LINEAR_SLOP), -MAX_CORRECTION, 0.0)
    rx, ry = qx - pose.x, qy - pose.y
    rn = rx * ny - ry * nx
    impulse = -excess / (LEG_INV_MASS + LEG_INV_INERTIA * rn * rn)
    impulse = jnp.where(point.valid, impulse, 0.0)
    pose = Pose(
        pose.x + LEG_INV_MASS * impulse * nx,
        pose.y + LEG_INV_MASS * impulse * ny,
        pose.a + LEG_INV_INERTIA * impulse * rn,
    )
    return pose, jnp.where(point.valid, jnp.minimum(separation, 0.0), 0.0)


class Closest(NamedTuple):
    """The features of edge and polygon that are closest, as continuous collision needs them.

    distance: between the cores, 0 if they overlap. kind: 0 two points, 1 the edge's face, 2 a face
    of the polygon. (nx, ny): the separating axis, in the world, for kind 2 in the polygon's frame;
    it points from the edge to the polygon (kind 2: from the polygon). (px, py): a point on the
    face, for kind 2 in the polygon's frame.
    """

    distance: Array
    kind: Array
    nx: Array
    ny: Array
    px: Array
    py: Array


def closest(edge: Edge, pose: Pose, vertices: np.ndarray, go: Array | None = None) -> Closest:
    """Distance of an edge and a polygon, and its separating axis."""
    n, ndim = len(vertices), pose.a.ndim
    outward = normals(vertices)
    along = np.linalg.norm(np.roll(vertices, -1, axis=0) - vertices, axis=1)
    vx, vy = _corners(vertices, pose)
    ex, ey = edge.x2 - edge.x1, edge.y2 - edge.y1
    length = jnp.sqrt(ex * ex + ey * ey)
    ex, ey = ex / length, ey / length
    enx, eny = ey, -ex
    vx, vy, length, ex, ey = barrier((vx, vy, length, ex, ey), go)

    # corners of the polygon against the edge, on both sides of it
    dx1, dy1 = vx - edge.x1[None], vy - edge.y1[None]
    dx2, dy2 = vx - edge.x2[None], vy - edge.y2[None]
    t, height = dx1 * ex[None] + dy1 * ey[None], dx1 * ey[None] - dy1 * ex[None]
    inside = (t > 0.0) & (t < length[None])
    front = jnp.where(inside & (height >= 0.0), height, np.inf).min(axis=0)
    back = jnp.where(inside & (height < 0.0), -height, np.inf).min(axis=0)
    lowest, highest = height.min(axis=0), height.max(axis=0)
    # corners against the ends of the edge
    dx, dy = barrier((jnp.concatenate([dx1, dx2]), jnp.concatenate([dy1, dy2])), go)
    squared = barrier(dx * dx + dy * dy, go)
    negative, index = _largest(-squared)
    corner = jnp.sqrt(jnp.maximum(-negative, 1e-24))
    dx, dy = _select(index, dx) / corner, _select(index, dy) / corner
    # ends of the edge against the faces of the polygon, in its frame
    sin, cos = jnp.sin(pose.a), jnp.cos(pose.a)
    constants = np.concatenate(
        [outward, vertices, 0.5 * (vertices + np.roll(vertices, -1, axis=0)), along[:, None]],
        axis=1,
    )
    constants = constants.astype(np.float32).T.reshape(7, n, *[1] * ndim)
    nx, ny, x, y, mx, my, most = (jnp.asarray(c) for c in constants)
    face_distance, heights = [], []
    for end_x, end_y in ((edge.x1, edge.y1), (edge.x2, edge.y2)):
        lx, ly = end_x - pose.x, end_y - pose.y
        lx, ly = (cos * lx + sin * ly)[None] - x, (cos * ly - sin * lx)[None] - y
        h = nx * lx + ny * ly
        t = nx * ly - ny * lx
        heights.append(h)
        face_distance.append(jnp.where((t > 0.0) & (t < most) & (h > 0.0), h, np.inf))
    of_face, index = _largest(-jnp.minimum(*face_distance))
    of_face = -of_face
    gap = jnp.minimum(*heights).max(axis=0)
    gap = jnp.maximum(gap, jnp.maximum(lowest, -highest))

    of_edge = jnp.minimum(front, back)
    distance = jnp.minimum(jnp.minimum(of_edge, corner), of_face)
    kind = jnp.where(distance == of_edge, 1, jnp.where(distance == of_face, 2, 0))
    sign = jnp.where(front <= back, 1.0, -1.0)

    def by_kind(points, of_edge, of_face):
        return jnp.where(kind == 1, of_edge, jnp.where(kind == 2, of_face, points))

    return Closest(
        distance=jnp.where(gap <= 0.0, 0.0, distance),
        kind=kind,
        nx=by_kind(dx, sign * enx, _select(index, nx)),
        ny=by_kind(dy, sign * eny, _select(index, ny)),
        px=by_kind(0.0, 0.5 * (edge.x1 + edge.x2), _select(index, mx)),
        py=by_kind(0.0, 0.5 * (edge.y1 + edge.y2), _select(index, my)),
    )


def distance(edge: Edge, pose: Pose, vertices: np.ndarray, go: Array | None = None) -> Array:
    """Distance [m] of the cores of an edge and a polygon, 0 if they overlap."""
    return closest(edge, pose, vertices, go).distance


def time_of_impact(
    edge: Edge,
    start: Pose,
    end: Pose,
    vertices: np.ndarray,
    wanted: Array,
    go: Array | None = None,
) -> tuple[Array, Array]:
    """When a polygon that moves evenly from start to end comes within 0.005 m of an edge.

    Returns the share of the way, in [0, 1], and whether there is an impact. Only where `wanted`:
    the others take part in no iteration. The root of the separation along an axis is found by
    bisection and secant steps in turn, to +-0.00125 m, as in Box2D, which stops within this
    tolerance wherever its iteration happens to be: the iteration is part of the result.
    """
    low, high = TOI_TARGET - TOI_TOLERANCE, TOI_TARGET + TOI_TOLERANCE

    def at(t):
        return Pose(
            (1.0 - t) * start.x + t * end.x,
            (1.0 - t) * start.y + t * end.y,
            (1.0 - t) * start.a + t * end.a,
        )

    def separation(axis, witness, t):
        """Along the axis, at time t, of the witness vertices (polygon x, y; edge x, y)."""
        x, y, a = at(t)
        sin, cos = jnp.sin(a), jnp.cos(a)
        wx, wy, ex, ey = witness
        polygon_x, polygon_y = cos * wx - sin * wy + x, sin * wx + cos * wy + y
        face_nx, face_ny = cos * axis.nx - sin * axis.ny, sin * axis.nx + cos * axis.ny
        face_x, face_y = cos * axis.px - sin * axis.py + x, sin * axis.px + cos * axis.py + y
        of_points = (polygon_x - ex) * axis.nx + (polygon_y - ey) * axis.ny
        of_edge = (polygon_x - axis.px) * axis.nx + (polygon_y - axis.py) * axis.ny
        of_face = (ex - face_x) * face_nx + (ey - face_y) * face_ny
        return jnp.where(axis.kind == 0, of_points, jnp.where(axis.kind == 1, of_edge, of_face))

    def deepest(axis, t):
        """The witness vertices at time t: those farthest against the axis."""
        _, _, a = at(t)
        sin, cos = jnp.sin(a), jnp.cos(a)
        lx, ly = -(cos * axis.nx + sin * axis.ny), sin * axis.nx - cos * axis.ny
        values = jnp.stack([lx * x + ly * y for x, y in vertices])
        _, index = _largest(values)
        columns = vertices.T.reshape(2, -1, *[1] * a.ndim)
        wx, wy = (_select(index, jnp.asarray(column)) for column in columns)
        face_nx, face_ny = cos * axis.nx - sin * axis.ny, sin * axis.nx + cos * axis.ny
        ux = jnp.where(axis.kind == 2, -face_nx, axis.nx)
        uy = jnp.where(axis.kind == 2, -face_ny, axis.ny)
        second = ux * edge.x2 + uy * edge.y2 > ux * edge.x1 + uy * edge.y1
        return wx, wy, jnp.where(second, edge.x2, edge.x1), jnp.where(second, edge.y2, edge.y1)

    def root(axis, witness, t1, t2, s1, s2, wanted):
        """Bracketed by t1 (separation s1) and t2 (s2)."""

        def is_running(carry):
            count, _, _, _, _, _, done = carry
            return (count < 50) & ~jnp.all(done)

        def iterate(carry):
            count, a1, a2, s1, s2, t, done = carry
            secant = a1 + (TOI_TARGET - s1) * (a2 - a1) / jnp.where(s1 == s2, 1.0, s2 - s1)
            t = jnp.where(done, t, jnp.where(count % 2 == 1, secant, 0.5 * (a1 + a2)))
            s = separation(axis, witness, t)
            done = done | (jnp.abs(s - TOI_TARGET) < TOI_TOLERANCE)
            before = ~done & (s > TOI_TARGET)
            after = ~done & ~before
            return (
                count + 1,
                jnp.where(before, t, a1),
                jnp.where(after, t, a2),
                jnp.where(before, s, s1),
                jnp.where(after, s, s2),
                t,
                done,
            )

        carry = (jnp.int32(0), t1, t2, s1, s2, t2, ~wanted)
        *_, t, done = jax.lax.while_loop(is_running, iterate, carry)
        return t, done

    def is_running(carry):
        count, _, running, _, _, _ = carry
        return (count < 64) & jnp.any(running)

    def advance(carry):
        # An axis is looked for where `fresh`, else the push back goes on from t2.
        count, t1, running, hit, fresh, (axis, t2, push) = carry
        new = closest(edge, at(t1), vertices, go)
        axis = jax.tree.map(lambda a, b: jnp.where(fresh, a, b), new, axis)
        t2, push = jnp.where(fresh, 1.0, t2), jnp.where(fresh, 0, push)
        is_touching = fresh & (axis.distance > 0.0) & (axis.distance < high)
        hit = jnp.where(running, is_touching, hit)
        running = running & ~(fresh & (axis.distance < high))

        witness = deepest(axis, t2)
        s2 = separation(axis, witness, t2)
        running = running & ~(s2 > high)  # apart at the end
        reached = s2 > low  # on to the next axis, from t2
        s1 = separation(axis, witness, t1)
        is_stuck = running & ~reached & (s1 <= high)
        hit = jnp.where(is_stuck, s1 >= low, hit)
        running = running & ~is_stuck
        searching = running & ~reached
        t, found = root(axis, witness, t1, t2, s1, s2, searching)
        t1 = jnp.where(running & reached, t2, t1)
        t2 = jnp.where(searching & found, t, t2)
        push = jnp.where(searching, push + 1, push)
        fresh = reached | (push >= 8)
        return count + 1, t1, running, hit, fresh, (axis, t2, push)

    zero = jnp.zeros_like(start.x)
    axis = Closest(zero, jnp.zeros_like(zero, dtype=jnp.int32), zero, zero, zero, zero)
    falses = jnp.zeros_like(zero, dtype=bool)
    carry = (
        jnp.int32(0),
        zero,
        wanted,
        falses,
        ~falses,
        (axis, zero, jnp.zeros_like(zero, dtype=jnp.int32)),
    )
    _, t1, running, hit, _, _ = jax.lax.while_loop(is_running, advance, carry)
    return t1, hit & ~running
