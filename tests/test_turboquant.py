# SPDX-License-Identifier: MIT
"""tbq.turboquant: the theorems as statistics, the codebooks against the textbooks and libtbq, every error.

Seeds are fixed, so a test always has the same result.  Intervals are Z standard errors wide to each side: of 150000
other choices of seeds, one would fail.
"""

import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest

import tbq
from conftest import ROOT, script
from tbq import turboquant as tq
from tbq.turboquant import _checks

#: tools/figures/turboquant.py, which draws the pictures of docs/measurements/turboquant.md.
figures = script("figures/turboquant")

Z = 4.5
BITS = range(1, 9)


def interval(samples, alike=()):
    """(mean over the first axis, Z standard errors).  alike: other axes along which the distribution is the same."""
    deviation = np.std(samples, axis=(0, *alike), ddof=1, keepdims=True)[0]
    return np.mean(samples, axis=0), Z * deviation / math.sqrt(len(samples)) + 1e-12


def within(samples, expected, alike=()):
    mean, error = interval(samples, alike)
    return bool(np.all(np.abs(mean - expected) <= error))


def below(samples, bound, alike=()):
    mean, error = interval(samples, alike)
    return bool(np.all(mean + error < bound))


def follows(samples, density, low, high):
    """The Kolmogorov-Smirnov test: whether samples may be from a density, at a level of 1e-6."""
    grid = np.linspace(low, high, 200001)
    middle = (grid[1:] + grid[:-1]) / 2
    cdf = np.concatenate([[0], np.cumsum(density(middle) * np.diff(grid))])
    assert abs(cdf[-1] - 1) < 1e-3
    ordered = np.sort(np.ravel(samples))
    at = np.interp(ordered, grid, cdf)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(np.abs(at - steps[1:]).max(), np.abs(at - steps[:-1]).max())
    return distance < math.sqrt(math.log(2 / 1e-6) / 2 / len(ordered)) + 1e-4


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def adversarial(dim):
    """Unit vectors that are hard without a rotation: sparse, constant, of one sign, of all sizes, with heavy tails."""
    rows = np.zeros((9, dim))
    rows[0, 0] = 1
    rows[1, [0, dim // 2]] = 1
    rows[2, :4] = 1
    rows[3] = 1
    rows[4] = (-1.0) ** np.arange(dim)
    rows[5] = 0.5 ** np.arange(dim)
    rows[6] = np.arange(1, dim + 1)
    rows[7] = np.random.RandomState(1).standard_cauchy(dim)
    rows[8, : dim // 2 + 1] = 1
    return unit(rows)


@pytest.fixture(scope="module")
def tables():
    """tools/tables.py, which makes the codebooks of libtbq."""
    return script("tables")


# --- codebooks --------------------------------------------------------------------------------------------------------


# Max 1960, table I: distortion and entropy
@pytest.mark.parametrize(
    "bits, distortion, entropy",
    [(1, 0.3634, 1.000), (2, 0.1175, 1.911), (3, 0.03454, 2.825), (4, 0.009497, 3.765), (5, 0.002499, 4.730)],
)
def test_gaussian_codebook_is_in_the_textbook(bits, distortion, entropy):
    codebook = tq.gaussian_codebook(bits)
    assert codebook.distortion == pytest.approx(distortion, rel=3e-3)
    assert codebook.entropy == pytest.approx(entropy, abs=6e-4)


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_gaussian_codebook_is_that_of_libtbq(bits, tables):
    ours = tq.gaussian_codebook(bits)
    assert np.abs(ours.levels - tables.lloyd_max(bits)).max() < 1e-11  # the tolerance of the iteration there
    assert ours.distortion == pytest.approx(tables.distortion(list(ours.levels)), rel=1e-12)
    integers = np.array(tbq.types[f"tbq{bits}_0"].levels)
    multiplier = integers @ ours.levels / (ours.levels @ ours.levels)
    # tables.py rounds multiples of the levels, and takes the multiple with the smallest distortion
    assert np.abs(ours.levels * multiplier - integers).max() < 0.75
    scale = ours.distortion / tables.distortion([k / multiplier for k in integers])
    assert 0.997 < scale < 1


def probability(kind, low, high):
    """(probability, first moment) of an interval by Simpson's rule, in a parameter without poles."""

    def simpson(function, a, b):
        t = np.linspace(a, b, 4001)
        weight = np.full(4001, 2.0)
        weight[1::2], weight[[0, -1]] = 4, 1
        return (b - a) / 12000 * (weight * function(t)).sum()

    if kind == "gaussian":

        def density(u):
            return np.exp(-u * u / 2) / math.sqrt(2 * math.pi)

        return simpson(density, low, high), simpson(lambda u: u * density(u), low, high)
    constant = math.exp(math.lgamma(kind / 2) - math.lgamma((kind - 1) / 2)) / math.sqrt(math.pi)
    a, b = math.asin(low), math.asin(high)
    return (
        simpson(lambda u: constant * np.cos(u) ** (kind - 2), a, b),
        simpson(lambda u: np.sin(u) * constant * np.cos(u) ** (kind - 2), a, b),
    )


@pytest.mark.parametrize("kind", ("gaussian", 2, 3, 4, 7, 64, 1536))
@pytest.mark.parametrize("bits", (1, 2, 4, 6, 8))
def test_levels_are_the_means_of_their_cells(kind, bits):
    """With midpoints as borders, that is the condition of Lloyd and Max.  It holds up to rounding."""
    codebook = tq.gaussian_codebook(bits) if kind == "gaussian" else tq.sphere_codebook(bits, kind)
    assert codebook.levels.shape == (2**bits,) and codebook.thresholds.shape == (2**bits - 1,)
    assert np.array_equal(codebook.thresholds, (codebook.levels[1:] + codebook.levels[:-1]) / 2)
    assert np.all(np.diff(codebook.levels) > 0) and np.array_equal(codebook.levels, -codebook.levels[::-1])
    end = 12.0 if kind == "gaussian" else min(1.0, 12 / math.sqrt(kind))
    borders = [-end, *codebook.thresholds, end]
    mass = distortion = 0.0
    for low, high, level in zip(borders, borders[1:], codebook.levels):
        p, moment = probability(kind, low, high)
        assert moment / p == pytest.approx(level, abs=1e-11 * end)
        mass, distortion = mass + p, distortion - moment * level
    assert mass == pytest.approx(1, abs=1e-9)
    variance = 1.0 if kind == "gaussian" else 1 / kind
    assert codebook.distortion == pytest.approx(variance + distortion, abs=1e-8 * variance)


def test_small_spheres_have_known_codebooks():
    circle = tq.sphere_codebook(1, 2).levels  # the mean of |cos|
    assert circle == pytest.approx([-2 / math.pi, 2 / math.pi], abs=1e-14)
    for bits in BITS:  # a coordinate of the sphere in space is uniform (Archimedes)
        n = 2**bits
        assert tq.sphere_codebook(bits, 3).levels == pytest.approx((2 * np.arange(n) + 1 - n) / n, abs=1e-12)
    points = tq.sphere_codebook(2, 1)
    assert points.levels[[0, -1]] == pytest.approx([-1, 1]) and points.distortion == 0


@pytest.mark.parametrize("bits", BITS)
def test_large_spheres_are_gaussian(bits):
    dim = 10**6
    assert math.sqrt(dim) * tq.sphere_codebook(bits, dim).levels == pytest.approx(
        tq.gaussian_codebook(bits).levels, rel=3e-5
    )


def test_no_bits_is_the_mean():
    for codebook, variance in ((tq.gaussian_codebook(0), 1), (tq.sphere_codebook(0, 7), 1 / 7)):
        assert codebook.levels.tolist() == [0] and codebook.thresholds.size == 0
        assert codebook.distortion == pytest.approx(variance)


def test_codebooks_are_solved_once_and_cannot_be_written():
    assert tq.sphere_codebook(4, 96) is tq.sphere_codebook(4, 96) and tq.gaussian_codebook(3) is tq.gaussian_codebook(3)
    with pytest.raises(ValueError, match="read-only"):
        tq.gaussian_codebook(3).levels[0] = 0


def test_encode_finds_the_nearest_level():
    codebook = tq.gaussian_codebook(3)
    x = np.random.RandomState(0).standard_normal((50, 20))
    expected = np.abs(x[..., None] - codebook.levels).argmin(-1)
    assert np.array_equal(codebook.encode(x), expected) and codebook.encode(x).dtype == np.uint8
    assert np.array_equal(codebook.decode(expected), codebook.levels[expected])


@pytest.mark.parametrize("dim", (2, 3, 4, 17, 300))
def test_sphere_density_is_that_of_random_directions(dim):
    x = unit(np.random.RandomState(dim).standard_normal((20000, dim)))[:, 0]
    if dim == 2:  # the density has poles, so the angle is tested instead
        assert follows(np.arcsin(x), lambda u: tq.sphere_density(np.sin(u), 2) * np.cos(u), -math.pi / 2, math.pi / 2)
    else:
        assert follows(x, lambda v: tq.sphere_density(v, dim), -1, 1)
    assert not follows(0.8 * x, lambda v: tq.sphere_density(v, dim), -1, 1)
    assert tq.sphere_density(1.5, dim) == 0


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", (0, 1, 3, 8, 64, 101))
def test_pack_and_unpack(bits, count):
    indices = np.random.RandomState(bits).randint(0, 2**bits, (2, 3, count))
    packed = tq.pack(indices, bits)
    assert tq.packed_bytes(count, bits) == math.ceil(count * bits / 8)
    assert packed.dtype == np.uint8 and packed.shape == (2, 3, tq.packed_bytes(count, bits))
    assert np.array_equal(tq.unpack(packed, bits, count), indices)
    as_number = sum(int(v) << i * bits for i, v in enumerate(indices[1, 2]))  # the layout, computed in another way
    assert int.from_bytes(packed[1, 2].tobytes(), "little") == as_number


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: tq.pack([0, 8], 3), "indices reach from 0 to 8; 3 bits hold 0 to 7"),
        (lambda: tq.pack([-1], 3), "indices reach from -1 to -1; 3 bits hold 0 to 7"),
        (
            lambda: tq.pack([0.5], 3),
            "indices have dtype float64 and 1 axes; they must be integers and have at least one axis",
        ),
        (
            lambda: tq.pack(3, 3),
            "indices have dtype int64 and 0 axes; they must be integers and have at least one axis",
        ),
        (lambda: tq.pack([1], 9), "bits is 9; it must be an integer from 1 to 8"),
        (lambda: tq.pack([1], 0), "bits is 0; it must be an integer from 1 to 8"),
        (lambda: tq.pack([1], 2.0), "bits is 2.0; it must be an integer from 1 to 8"),
        (lambda: tq.unpack(np.zeros(3, np.uint8), 4, 5 + 2), "packed has shape (3,); 7 indices of 4 bits take 4 bytes"),
        (
            lambda: tq.unpack(np.zeros(3), 4, 6),
            "packed has dtype float64 and 1 axes; it must be uint8 and have at least one axis",
        ),
        (lambda: tq.unpack(np.zeros(3, np.uint8), 4, -1), "count is -1; it must be an integer of at least 0"),
    ],
)
def test_packing_errors(call, text):
    with pytest.raises(tbq.TBQError, match=f"^{re.escape(text)}$"):
        call()


# --- rotations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", (1, 2, 3, 5, 64, 100, 129))
@pytest.mark.parametrize("kind", (tq.HaarRotation, tq.HadamardRotation))
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_rotations_are_orthogonal(dim, kind, dtype):
    rotation = kind(dim, 5)
    x = np.random.RandomState(0).standard_normal((3, 4, dim)).astype(dtype)
    y, close = rotation.rotate(x), 2e-5 if dtype == np.float32 else 1e-12
    assert y.dtype == dtype and y.shape == x.shape
    assert np.allclose(rotation.unrotate(y), x, atol=close)
    assert np.allclose(
        y.reshape(12, dim) @ y.reshape(12, dim).T, x.reshape(12, dim) @ x.reshape(12, dim).T, atol=close * dim
    )
    matrix = rotation.rotate(np.eye(dim, dtype=dtype))
    assert np.allclose(matrix @ matrix.T, np.eye(dim), atol=close)
    assert dim == 1 or not np.allclose(kind(dim, 6).rotate(x), y)
    assert np.array_equal(kind(dim, 5).rotate(x), y)


def test_haar_is_uniform():
    """Each entry of the matrix is distributed as a coordinate of the sphere.  QR without corrected signs fails."""
    found = np.array([tq.HaarRotation(3, seed).matrix for seed in range(4000)])
    for row, column in itertools.product(range(3), repeat=2):
        assert follows(found[:, row, column], lambda v: tq.sphere_density(v, 3), -1, 1), (row, column)
    assert within(np.linalg.det(found), 0)  # reflections as often as not


def test_seeds_mean_the_same_everywhere():
    """Values of NumPy's frozen streams.  If they change, stored codes can no longer be decoded from their seed."""
    assert tq.HaarRotation(3, 7).matrix == pytest.approx(
        np.array(
            [
                [0.05609755, -0.04280021, -0.9975075],
                [-0.47562925, -0.87957717, 0.01099185],
                [-0.87785528, 0.47382712, -0.06969916],
            ]
        ),
        abs=1e-8,
    )
    assert tq.HadamardRotation(6, 7).rotate(np.arange(6.0)).tolist() == [2.5, 0.75, -4.625, 2.875, 1.875, 3.875]
    assert tq.QJL(3, 1, seed=7).matrix == pytest.approx(np.array([[0.40796046, 0.00719853, 0.09545472]]), abs=1e-8)
    assert tq.HaarRotation(3, 2**64 - 1).seed == 2**64 - 1


def test_one_round_of_hadamard_breaks_the_bound_and_three_keep_it():
    x = np.zeros((1, 256))
    x[0, [0, 128]] = math.sqrt(0.5)

    def errors(rounds):
        found = []
        for seed in range(200):
            quantizer = tq.MSEQuantizer(256, 4, rotation=tq.HadamardRotation(256, seed, rounds))
            found.append(((quantizer.dequantize(quantizer.quantize(x)) - x) ** 2).sum())
        return np.array(found)

    assert np.mean(errors(1)) > 2 * tq.mse_upper_bound(4)
    assert below(errors(3), tq.mse_upper_bound(4)) and within(errors(3), tq.mse_distortion(4, 256))


# --- Theorem 1: the MSE quantizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, expected", [(1, 0.363), (2, 0.117), (3, 0.0345), (4, 0.0095)])
def test_distortion_per_bit(bits, expected):
    assert tq.mse_distortion(bits, 4096) == pytest.approx(expected, rel=0.005)
    assert tq.gaussian_codebook(bits).distortion == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("dim, seeds", [(3, 400), (64, 500), (100, 60)])
def test_mse_distortion_of_any_input(dim, seeds):
    """The error is mse_distortion, and below the bound, for every input and number of bits."""
    x = adversarial(dim)
    errors = np.empty((seeds, len(x), len(BITS)))
    for seed in range(seeds):
        rotation = tq.HaarRotation(dim, seed)
        for i, bits in enumerate(BITS):
            quantizer = tq.MSEQuantizer(dim, bits, rotation=rotation)
            errors[seed, :, i] = ((quantizer.dequantize(quantizer.quantize(x)) - x) ** 2).sum(-1)
    # All inputs have the same distribution of errors.  With many bits its tail is long: of one input there are too few
    # samples for the deviation.
    assert within(errors, [tq.mse_distortion(bits, dim) for bits in BITS], alike=(1,))
    # With more bits the expected error is too close to the bound for the intervals; test_bounds_enclose_the_distortion
    # tests them.
    assert below(errors[..., :3], [tq.mse_upper_bound(bits) for bits in BITS[:3]], alike=(1,))


@pytest.mark.parametrize("dim", (1, 2, 3, 5, 16, 64, 200, 1024, 10000))
def test_bounds_enclose_the_distortion(dim):
    for bits in range(9):
        expected = tq.mse_distortion(bits, dim)
        assert tq.mse_lower_bound(bits, dim) <= expected * (1 + 1e-12) and expected <= tq.mse_upper_bound(bits)
        if bits:
            assert tq.inner_product_distortion(bits, dim) <= tq.inner_product_upper_bound(bits, dim)


def test_reconstructions_are_short_by_the_gain():
    """E <y, x'> = gain <y, x>; the gain is 2/pi with one bit.  Divided by the gain, products are unbiased."""
    dim = 24
    x = adversarial(dim)
    rotations = [tq.HaarRotation(dim, seed) for seed in range(400)]
    for bits in (1, 2, 3):
        plain, unbiased = np.empty((len(rotations), 9, 9)), np.empty((len(rotations), 9, 9))
        for seed, rotation in enumerate(rotations):
            quantizer = tq.MSEQuantizer(dim, bits, rotation=rotation)
            code = quantizer.quantize(x)
            plain[seed] = quantizer.inner_products(x, code)
            unbiased[seed] = quantizer.inner_products(x, code, unbiased=True)
        gain = quantizer.gain
        assert gain == pytest.approx(1 - tq.mse_distortion(bits, dim))
        assert within(plain, gain * (x @ x.T)) and not within(plain, x @ x.T)
        assert within(unbiased, x @ x.T)
    assert tq.MSEQuantizer(10**4, 1, rotation="hadamard").gain == pytest.approx(2 / math.pi, rel=1e-3)


# --- QJL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", (0.0, 0.5, -0.9, 1.0))
@pytest.mark.parametrize("rows", (1, 40))
def test_qjl_is_unbiased_with_the_variance_stated(cosine, rows):
    x = 3 * np.array([1.0, 0, 0])
    y = 2 * np.array([cosine, math.sqrt(1 - cosine**2), 0])
    seeds = 4000
    found = np.empty(seeds)
    for seed in range(seeds):
        qjl = tq.QJL(3, rows, seed=seed)
        found[seed] = qjl.inner_products(y, qjl.quantize(x))
    assert within(found, x @ y)
    variance = (math.pi / 2 * 9 * 4 - (x @ y) ** 2) / rows
    assert within((found - x @ y) ** 2, variance)
    assert variance <= math.pi / 2 * 9 * 4 / rows


def test_qjl_rows_are_enough():
    """At a right angle, the number of the QJL paper's Lemma 3.5 is not."""
    epsilon, delta, seeds = 0.1, 0.002, 4000

    def failures(rows):
        count = 0
        for seed in range(seeds):
            qjl = tq.QJL(2, rows, seed=seed)
            count += abs(float(qjl.inner_products([0.0, 1.0], qjl.quantize([1.0, 0.0])))) > epsilon
        return count / seeds

    assert failures(tq.qjl_rows(epsilon, delta)) <= delta
    assert failures(math.ceil(4 / 3 * (1 + epsilon) / epsilon**2 * math.log(2 / delta))) > delta + Z * math.sqrt(
        delta / seeds
    )


# --- Theorem 2: the inner-product quantizer ---------------------------------------------------------------------------


@pytest.mark.parametrize("dim, seeds", [(5, 3000), (64, 300)])
@pytest.mark.parametrize("bits", (1, 2, 3, 4))
def test_inner_products_are_unbiased_and_under_the_bound(dim, seeds, bits):
    x = adversarial(dim)
    found = np.empty((seeds, 9, 9))
    for seed in range(seeds):
        quantizer = tq.InnerProductQuantizer(dim, bits, seed=seed)
        found[seed] = quantizer.inner_products(x, quantizer.quantize(x))  # adversarial queries too
    assert within(found, x @ x.T)
    squared = (found - x @ x.T) ** 2
    bound = tq.inner_product_upper_bound(bits, dim)
    mean, error = interval(squared)
    assert np.all(mean < bound + error) and below(squared.mean((1, 2)), bound)
    # The exact error for a y at a right angle to x: the residual r has E <y, r>^2 = D (1 - D) / (dim - 1) there.
    expected = tq.inner_product_distortion(bits, dim)
    right = np.abs(x @ x.T) < 1e-12
    D = tq.mse_distortion(bits - 1, dim)
    assert right.any() and within(squared[:, right].mean(1), expected - D * (1 - D) / (dim - 1) / dim)


@pytest.mark.parametrize("rotation", (tq.HaarRotation(16, 3), tq.HadamardRotation(16, 3, rounds=1)))
def test_unbiased_with_any_rotation(rotation):
    """The projections alone make it unbiased: here all seeds have the same rotation."""
    x = adversarial(16)
    found = np.empty((1500, 9, 9))
    for seed in range(len(found)):
        quantizer = tq.InnerProductQuantizer(16, 2, seed=seed, rotation=rotation)
        found[seed] = quantizer.inner_products(x, quantizer.quantize(x))
    assert within(found, x @ x.T)


def test_inner_product_error_falls_as_one_over_dim():
    """The slope of log error against log dim, with its error."""
    dims, bits, seeds = (16, 32, 64, 128), 2, 12
    logs = np.empty((seeds, len(dims)))
    for i, dim in enumerate(dims):
        random = np.random.RandomState(dim)
        x, y = unit(random.standard_normal((200, dim))), unit(random.standard_normal((200, dim)))
        for seed in range(seeds):
            quantizer = tq.InnerProductQuantizer(dim, bits, seed=seed)
            errors = quantizer.inner_products(y, quantizer.quantize(x)) - y @ x.T
            logs[seed, i] = np.log(np.mean(errors**2))
    slopes = np.array([np.polyfit(np.log(dims), row, 1)[0] for row in logs])
    assert np.std(slopes) < 0.08 and within(slopes, -1)


# the paper prints 0.56, 0.18 and 0.047 for 2 to 4 bits: pi/2 times 0.36, 0.117 and 0.03
@pytest.mark.parametrize("bits, expected", [(1, 1.571), (2, 0.571), (3, 0.1845), (4, 0.0543)])
def test_inner_product_distortion_per_bit(bits, expected):
    assert 10**6 * tq.inner_product_distortion(bits, 10**6) == pytest.approx(expected, rel=1e-3)


# --- Theorem 3: the lower bound ---------------------------------------------------------------------------------------


def test_lower_bound_in_the_limit_of_many_dimensions():
    for bits in (1, 2.5, 4):
        assert tq.mse_lower_bound(bits) == 4.0**-bits
        assert tq.mse_lower_bound(bits, 10**6) == pytest.approx(4.0**-bits, rel=1e-4)
        assert tq.inner_product_lower_bound(bits, 128) == 4.0**-bits / 128


@pytest.mark.parametrize("bits", (0.5, 1, 2, 3, 8))
def test_lower_bound_is_reached_on_the_circle(bits):
    """Arcs of equal length are the best cells.  Their error is below 4^-bits, which is no bound in two dimensions."""
    half = math.pi / 4**bits
    exact = 1 - (math.sin(half) / half) ** 2
    assert tq.mse_lower_bound(bits, 2) == pytest.approx(exact, rel=1e-6)
    assert bits < 1 or exact < 4.0**-bits
    angles = np.random.RandomState(0).uniform(0, 2 * math.pi, 20000)
    if bits >= 1:
        centers = (np.floor(angles / (2 * half)) + 0.5) * 2 * half
        factor = math.sin(half) / half
        assert within(1 - 2 * factor * np.cos(angles - centers) + factor**2, exact)


@pytest.mark.parametrize("dim, bits", [(3, 1), (3, 2), (4, 1.5), (8, 1)])
def test_no_trained_quantizer_beats_the_lower_bound(dim, bits):
    """k-means for this distribution, the best known codebook of 2^(bits dim) vectors."""
    random = np.random.RandomState(0)
    train, test = unit(random.standard_normal((20000, dim))), unit(random.standard_normal((20000, dim)))
    centers = train[: round(2 ** (bits * dim))].copy()
    for _ in range(20):
        nearest = (train @ centers.T - (centers**2).sum(1) / 2).argmax(1)
        for i in range(len(centers)):
            if np.any(nearest == i):
                centers[i] = train[nearest == i].mean(0)
    nearest = (test @ centers.T - (centers**2).sum(1) / 2).argmax(1)
    errors = ((test - centers[nearest]) ** 2).sum(1)
    bound = tq.mse_lower_bound(bits, dim)
    assert np.mean(errors) > bound
    # and the bound is nearly reached
    assert np.mean(errors) - Z * np.std(errors) / math.sqrt(len(errors)) < 1.25 * bound


# --- PolarQuant -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_polar_there_and_back(dtype):
    x = np.random.RandomState(0).standard_normal((3, 2, 48)).astype(dtype)
    x[0, 0], x[0, 1, 3] = 0, -0.0
    for levels in (1, 2, 4):
        radii, angles = tq.to_polar(x, levels)
        assert radii.shape == (3, 2, 48 >> levels)
        assert [a.shape[-1] for a in angles] == [48 >> l for l in range(1, levels + 1)]
        assert radii.dtype == dtype and all(a.dtype == dtype for a in angles)
        assert np.all(angles[0] >= 0) and np.all(angles[0] <= dtype(2 * math.pi))
        assert all(np.all(a >= 0) and np.all(a <= dtype(math.pi / 2)) for a in angles[1:])
        assert np.allclose(tq.from_polar(radii, angles), x, atol=1e-6 if dtype == np.float32 else 1e-14)
        assert np.allclose((radii**2).sum(-1), (x**2).sum(-1), rtol=1e-5)


def test_angles_have_their_densities_and_are_independent():
    x = np.random.RandomState(0).standard_normal((4000, 32))
    radii, angles = tq.to_polar(x, 5)
    for level, angle in enumerate(angles, 1):
        high = 2 * math.pi if level == 1 else math.pi / 2
        assert follows(angle, lambda v: tq.angle_density(v, level), 0, high), level
        assert not follows(0.8 * angle + 0.1, lambda v: tq.angle_density(v, level), 0, high)
    first = np.column_stack([np.cos(angles[0][:, 0])] + [a[:, 0] for a in angles[1:]] + [radii[:, 0]])
    correlation = np.corrcoef(first.T) - np.eye(6)
    assert np.abs(correlation).max() < Z / math.sqrt(len(x))


@pytest.mark.parametrize("bits", [(4, 2, 2, 2), (1,), (3, 3), (8, 7, 6, 5, 4)])
def test_polar_distortion_of_any_input(bits):
    dim = 64
    x = adversarial(dim)
    errors = np.empty((150, len(x)))
    for seed in range(len(errors)):
        quantizer = tq.PolarQuantizer(dim, bits, seed=seed)
        decoded = quantizer.dequantize(quantizer.quantize(x))
        errors[seed] = ((decoded - x) ** 2).sum(-1)
        assert np.allclose(np.linalg.norm(decoded, axis=1), 1)  # radii are exact
    assert within(errors, tq.polar_distortion(bits))


def test_polar_error_falls_by_four_with_a_bit_more():
    """PolarQuant, Theorem 1: log(1/error) bits suffice."""
    errors = [tq.polar_distortion((b,) * 4) for b in range(4, 9)]
    assert np.array(errors[:-1]) / errors[1:] == pytest.approx(4, rel=0.06)


def test_polar_bytes():
    code = tq.PolarQuantizer(128).quantize(np.ones((5, 128), np.float32))
    assert [a.shape for a in code.angles] == [(5, 32), (5, 8), (5, 4), (5, 2)]
    assert code.radii.shape == (5, 8) and code.shape == (5,)
    assert code.nbytes == 5 * (46 + 8 * 4)
    assert (8 * 46 + 8 * 16) / 128 == 3.875  # the paper's number, with radii of 16 bits


# --- mixed precision --------------------------------------------------------------------------------------------------


def with_outliers(rows=400, dim=128):
    x = np.random.RandomState(3).standard_normal((rows, dim)).astype(np.float32)
    x[:, 5::4] *= 12
    return x


@pytest.mark.parametrize(
    "bits, count, low, high",
    [(2.5, 32, 2, 4), (2.5, 64, 2, 3), (3.5, 32, 3, 5), (3.5, 64, 3, 4), (2.25, 32, 2, 3), (3, 10, 3, 3)],
)
def test_mixed_bits(bits, count, low, high):
    x = with_outliers()
    quantizer = tq.MixedQuantizer(128, bits, tq.outlier_channels(x, count))
    assert (quantizer.low, quantizer.high, quantizer.bits) == (low, high, bits)
    code = quantizer.quantize(x.reshape(20, 20, 128))
    assert code.shape == (20, 20)
    assert code.outliers.packed.nbytes + code.rest.packed.nbytes == 400 * (
        math.ceil(count * high / 8) + math.ceil((128 - count) * low / 8)
    )
    assert quantizer.dequantize(code).dtype == np.float32


def test_outliers_are_found():
    assert tq.outlier_channels(with_outliers(), 31).tolist() == list(range(5, 128, 4))
    largest = 3e38 * np.sign(with_outliers()) * (np.arange(128) > 100).astype(np.float32)
    assert tq.outlier_channels(largest, 3).min() > 100
    assert tq.outlier_channels(np.zeros((2, 4)), 2).tolist() == [0, 1]


def test_mixed_precision_is_worth_its_bits():
    """With outliers, 2.5 bits are better than 3 bits for all.  Each set has the distortion of its own bits."""
    x = with_outliers().astype(np.float64)
    outliers = tq.outlier_channels(x, 32)
    ours, shares = [], []
    for seed in range(20):
        quantizer = tq.MixedQuantizer(128, 2.5, outliers, seed=seed)
        error = quantizer.dequantize(quantizer.quantize(x)) - x
        ours.append((error**2).sum() / (x**2).sum())
        shares.append(
            [
                (error[:, channels] ** 2).sum() / (x[:, channels] ** 2).sum()
                for channels in (quantizer.outliers, quantizer.rest)
            ]
        )
    assert within(shares, [tq.mse_distortion(4, 32), tq.mse_distortion(2, 96)])
    assert np.mean(ours) < tq.mse_distortion(3, 128) / 2


def test_mixed_inner_products_are_unbiased():
    dim = 32
    x = adversarial(dim)
    found = np.empty((400, 9, 9))
    for seed in range(len(found)):
        quantizer = tq.MixedQuantizer(dim, 2.5, [0, 1, 2, 3, 8, 16, 30, 31], inner_product=True, seed=seed)
        code = quantizer.quantize(x)
        found[seed] = quantizer.inner_products(x, code)
        assert np.allclose(found[seed], x @ quantizer.dequantize(code).T)
    assert within(found, x @ x.T)


# --- all quantizers ---------------------------------------------------------------------------------------------------


QUANTIZERS = {
    "MSEQuantizer": lambda dim, **options: tq.MSEQuantizer(dim, 3, **options),
    "MSEQuantizer, hadamard": lambda dim, **options: tq.MSEQuantizer(dim, 5, rotation="hadamard", **options),
    "InnerProductQuantizer": lambda dim, **options: tq.InnerProductQuantizer(dim, 3, **options),
    "InnerProductQuantizer, 1 bit": lambda dim, **options: tq.InnerProductQuantizer(dim, 1, **options),
    "QJL": lambda dim, **options: tq.QJL(dim, 50, **options),
    "MixedQuantizer": lambda dim, **options: tq.MixedQuantizer(dim, 2.5, range(dim // 2), **options),
    "PolarQuantizer": lambda dim, **options: tq.PolarQuantizer(dim, (3, 2), **options),
}


@pytest.fixture(params=QUANTIZERS)
def make(request):
    return QUANTIZERS[request.param]


def arrays(code):
    """Every array in a code, in order."""
    if isinstance(code, np.ndarray):
        return [code]
    parts = code if isinstance(code, tuple) else vars(code).values() if code is not None else ()
    return [array for part in parts for array in arrays(part)]


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_leading_axes_dtypes_and_bytes(make, dtype):
    quantizer = make(20, seed=9)
    x = np.random.RandomState(0).standard_normal((4, 3, 20)).astype(dtype)
    code = quantizer.quantize(x)
    y = quantizer.dequantize(code)
    assert y.shape == x.shape and y.dtype == dtype and code.shape == (4, 3)
    assert code.nbytes == sum(array.nbytes for array in arrays(code))
    # results depend on the seed alone
    assert np.array_equal(make(20, seed=9).dequantize(make(20, seed=9).quantize(x)), y)
    assert not np.array_equal(make(20, seed=10).dequantize(make(20, seed=10).quantize(x)), y)
    for row in itertools.product(range(4), range(3)):
        one = quantizer.quantize(x[row])
        assert one.shape == () and np.allclose(quantizer.dequantize(one), y[row], atol=1e-5)
    assert np.array_equal(quantizer.dequantize(quantizer.quantize(np.asfortranarray(x)[:, ::-1])), y[:, ::-1])
    assert np.allclose(quantizer.dequantize(quantizer.quantize(x.tolist())), y, atol=1e-4)  # lists are float64


def test_inner_products_are_those_of_the_reconstructions(make):
    quantizer = make(20)
    random = np.random.RandomState(0)
    code, queries = quantizer.quantize(random.standard_normal((4, 3, 20))), random.standard_normal((5, 20))
    found = quantizer.inner_products(queries, code)
    assert found.shape == (5, 4, 3) and np.allclose(
        found, np.einsum("qi,abi->qab", queries, quantizer.dequantize(code))
    )
    assert quantizer.inner_products(queries[0], code).shape == (4, 3)
    single = quantizer.quantize(np.float32(random.standard_normal((3, 20))))
    assert quantizer.inner_products(queries.astype(np.float32), single).dtype == np.float32
    assert quantizer.inner_products(queries, single).dtype == np.float64


def test_parts_of_any_size_give_the_same(make, monkeypatch):
    quantizer = make(20)
    x = np.random.RandomState(0).standard_normal((37, 20))
    code = quantizer.quantize(x)
    monkeypatch.setattr(_checks, "_CHUNK", 100)
    again = quantizer.quantize(x)
    assert all(np.allclose(a, b) for a, b in zip(arrays(code), arrays(again), strict=True))
    assert np.allclose(quantizer.dequantize(again), quantizer.dequantize(code))
    assert np.allclose(quantizer.inner_products(x, again), x @ quantizer.dequantize(again).T)


@pytest.mark.parametrize("scale", (1e-44, 1e-30, 1e25, 1e36))
def test_vectors_of_any_length(make, scale):
    quantizer = make(20)
    x = np.random.RandomState(0).standard_normal((6, 20)).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        decoded = quantizer.dequantize(quantizer.quantize(x * np.float32(scale)))
        expected = quantizer.dequantize(quantizer.quantize(x))
    assert np.all(np.isfinite(decoded))
    if scale != 1e-44:  # float32 has only two digits there
        assert np.allclose(decoded / np.float32(scale), expected, rtol=1e-4, atol=1e-4)


def test_zero_stays_zero(make):
    x = np.zeros((2, 20), np.float32)
    x[1, 3] = 1
    decoded = make(20).dequantize(make(20).quantize(x))
    assert not np.any(decoded[0]) and np.any(decoded[1])


def test_one_dimension():
    for bits in BITS:
        quantizer = tq.MSEQuantizer(1, bits)
        assert quantizer.dequantize(quantizer.quantize([[-3.0], [0.5]])).tolist() == [[-3], [0.5]]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, text",
    [
        (np.full((2, 20), np.nan, np.float32), "x has nan at (0, 0); every value must be finite"),
        (
            np.where(np.arange(40).reshape(2, 20) == 27, -np.inf, 0.5),
            "x has -inf at (1, 7); every value must be finite",
        ),
        (np.ones((2, 19)), "x has shape (2, 19); its last axis must be 20"),
        (np.ones(()), "x has no axis; vectors are along its last axis"),
        (np.ones((0, 20)), "x has shape (0, 20); no axis may be empty"),
        (np.ones((3, 0)), "x has shape (3, 0); no axis may be empty"),
        (np.ones((3, 20), np.float16), "x has dtype float16; it must be float32 or float64"),
        (np.ones((3, 20), int), "x has dtype int64; it must be float32 or float64"),
        (np.ones((3, 20), ">f4"), "x has dtype >f4; it must be float32 or float64"),
        (np.ones((3, 20), complex), "x has dtype complex128; it must be float32 or float64"),
        ("text", "x has dtype <U4; it must be float32 or float64"),
        (None, "x has dtype object; it must be float32 or float64"),
    ],
)
def test_bad_vectors(make, x, text):
    quantizer = make(20)
    with pytest.raises(tbq.TBQError, match=f"^{re.escape(text)}$"):
        quantizer.quantize(x)
    with pytest.raises(tbq.TBQError, match=f"^{re.escape(text.replace('x ', 'queries ', 1))}$"):
        quantizer.inner_products(x, quantizer.quantize(np.ones((1, 20))))


@pytest.mark.filterwarnings("ignore:Creating an ndarray from ragged")
def test_rows_of_different_lengths(make):
    # NumPy before 1.24 makes an array of lists
    with pytest.raises(
        tbq.TBQError, match="^x is not an array of numbers; its rows must have one length$|^x has dtype object; "
    ):
        make(20).quantize([[1.0, 2.0], [3.0]])


def test_vectors_too_long_for_their_dtype(make):
    x = np.full((1, 20), 3e38, np.float32)
    with (
        np.errstate(all="raise"),
        pytest.raises(tbq.TBQError, match="than the largest float32$|beyond the largest float32$|rotated in float32$"),
    ):
        make(20).quantize(x)
    with pytest.raises(tbq.TBQError, match="^x has values too large to be rotated in float32$"):
        tq.HadamardRotation(20).rotate(x)
    with pytest.raises(tbq.TBQError, match="^x has a radius beyond the largest float32$"):
        tq.to_polar(x, 2)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: tq.MSEQuantizer(8, 0), "bits is 0; it must be an integer from 1 to 8"),
        (lambda: tq.MSEQuantizer(8, 9), "bits is 9; it must be an integer from 1 to 8"),
        (lambda: tq.MSEQuantizer(8, 2.5), "bits is 2.5; it must be an integer from 1 to 8"),
        (lambda: tq.MSEQuantizer(0, 4), "dim is 0; it must be an integer of at least 1"),
        (lambda: tq.MSEQuantizer("8", 4), "dim is '8'; it must be an integer of at least 1"),
        (lambda: tq.MSEQuantizer(8, 4, seed=-1), f"seed is -1; it must be an integer from 0 to {2**64 - 1}"),
        (lambda: tq.MSEQuantizer(8, 4, rotation="qr"), "rotation is 'qr'; it must be 'haar', 'hadamard' or a Rotation"),
        (lambda: tq.MSEQuantizer(8, 4, rotation=tq.HaarRotation(9)), "rotation has dim 9; the quantizer has 8"),
        (
            lambda: tq.MSEQuantizer(10**5, 4),
            "a rotation of 100000 x 100000 has more than the 67108864 values of a dense matrix; "
            "rotation='hadamard' needs none",
        ),
        (lambda: tq.InnerProductQuantizer(8, 9), "bits is 9; it must be an integer from 1 to 8"),
        (lambda: tq.QJL(8, 0), "rows is 0; it must be an integer of at least 1"),
        (lambda: tq.QJL(10**5), "a projection of 100000 x 100000 has more than the 67108864 values of a dense matrix"),
        (lambda: tq.HadamardRotation(8, 0, 9), "rounds is 9; it must be an integer from 1 to 8"),
        (lambda: tq.sphere_codebook(4, 0), "dim is 0; it must be an integer of at least 1"),
        (lambda: tq.gaussian_codebook(9), "bits is 9; it must be an integer from 0 to 8"),
        (lambda: tq.gaussian_codebook(2).encode([np.nan]), "values has nan at (0,); every value must be finite"),
        (lambda: tq.gaussian_codebook(2).decode([4]), "indices reach from 4 to 4; the codebook has 0 to 3"),
        (lambda: tq.gaussian_codebook(2).decode([1.0]), "indices have dtype float64; they must be integers"),
        (lambda: tq.angle_codebook(2, 0), "level is 0; it must be an integer from 1 to 30"),
        (lambda: tq.PolarQuantizer(24), "dim is 24; it must be a multiple of 16 for 4 levels of bits"),
        (lambda: tq.PolarQuantizer(32, (4, 0)), "bits[1] is 0; it must be an integer from 1 to 8"),
        (lambda: tq.PolarQuantizer(32, ()), "bits has 0 levels; it must have 1 to 30"),
        (
            lambda: tq.PolarQuantizer(32, 4),
            "bits is 4; it must be a list with the bits of each level, such as (4, 2, 2, 2)",
        ),
        (lambda: tq.to_polar(np.ones(6), 2), "x has shape (6,); its last axis must be a multiple of 4 for 2 levels"),
        (lambda: tq.to_polar(np.ones(6), 0), "levels is 0; it must be an integer from 1 to 30"),
        (lambda: tq.from_polar(np.ones(3), []), "angles is empty; to_polar returns those of at least one level"),
        (
            lambda: tq.from_polar(np.ones(3), [np.ones(6), np.ones(4)]),
            "angles[1] is float64 (4,); with these radii it must be float64 (3,)",
        ),
        (
            lambda: tq.MixedQuantizer(128, 2.5, range(20)),
            "bits is 2.5 and outliers names 20 of 128 channels, which would need 5.2 bits; name 16 or 32 or 64",
        ),
        (
            lambda: tq.MixedQuantizer(128, 2.001, range(20)),
            "bits is 2.001 and outliers names 20 of 128 channels, which would need 2.0064 bits; "
            "no number of channels gives 2.001",
        ),
        (lambda: tq.MixedQuantizer(128, 8.5, range(20)), "bits is 8.5; it must be a number from 1 to 8"),
        (lambda: tq.MixedQuantizer(128, "two", range(20)), "bits is 'two'; it must be a number from 1 to 8"),
        (lambda: tq.MixedQuantizer(128, math.nan, range(20)), "bits is nan; it must be a number from 1 to 8"),
        (
            lambda: tq.MixedQuantizer(128, 2.5, []),
            "outliers has shape (0,) and dtype float64; it must be a list of channel numbers",
        ),
        (
            lambda: tq.MixedQuantizer(128, 2.5, range(128)),
            "outliers names 128 of 128 channels; it must name at least 1, but not all",
        ),
        (lambda: tq.MixedQuantizer(128, 2.5, [1, 128]), "outliers reach from 1 to 128; channels are 0 to 127"),
        (lambda: tq.MixedQuantizer(128, 2.5, [1, 1]), "outliers names a channel twice"),
        (
            lambda: tq.MixedQuantizer(4, 2.5, [1], rotation=tq.HaarRotation(4)),
            "rotation must be 'haar' or 'hadamard'; the two sets of channels need one each",
        ),
        (lambda: tq.outlier_channels(np.ones((3, 8)), 8), "count is 8; it must be an integer from 1 to 7"),
        (lambda: tq.outlier_channels([[np.inf]], 1), "sample has inf at (0, 0); every value must be finite"),
        (lambda: tq.mse_upper_bound(-1), "bits is -1; it must be a number of at least 0"),
        (lambda: tq.mse_lower_bound(math.nan), "bits is nan; it must be a number of at least 0"),
        (lambda: tq.mse_lower_bound(2, 0), "dim is 0; it must be an integer of at least 1"),
        (lambda: tq.mse_upper_bound("2 bits"), "bits is '2 bits'; it must be a number of at least 0"),
        (lambda: tq.inner_product_distortion(0, 8), "bits is 0; it must be an integer from 1 to 8"),
        (lambda: tq.qjl_rows(0, 0.1), "epsilon is 0 and delta 0.1; epsilon must be above 0, delta between 0 and 1"),
    ],
)
def test_errors(call, text):
    with pytest.raises(tbq.TBQError, match=f"^{re.escape(text)}$"):
        call()


def test_codes_of_other_quantizers():
    x = np.ones((3, 20))
    mse, product = tq.MSEQuantizer(20, 3), tq.InnerProductQuantizer(20, 3)
    qjl, polar = tq.QJL(20), tq.PolarQuantizer(20, (3, 2))
    mixed = tq.MixedQuantizer(20, 2.5, range(10))
    code = mse.quantize(x)
    norms = code.norms
    wrong = [
        (mse, product.quantize(x), "code is a InnerProductCode; it must be a MSECode"),
        (mse, b"bytes", "code is a bytes; it must be a MSECode"),
        (mse, qjl.quantize(x), "code is a QJLCode; it must be a MSECode"),
        (
            mse,
            tq.MSEQuantizer(20, 4).quantize(x),
            "code.packed is uint8 (3, 10); with norms (3,) it must be uint8 (3, 8)",
        ),
        (
            mse,
            tq.MSECode(code.packed[:2], norms),
            "code.packed is uint8 (2, 8); with norms (3,) it must be uint8 (3, 8)",
        ),
        (
            mse,
            tq.MSECode(code.packed.tobytes(), norms),
            "code.packed is bytes; with norms (3,) it must be uint8 (3, 8)",
        ),
        (
            mse,
            tq.MSECode(code.packed, norms.astype(np.float16)),
            "code.norms is float16; it must be an array of float32 or float64",
        ),
        (
            mse,
            tq.MSECode(code.packed, -norms),
            "code.norms has a value that is negative or not finite; they are lengths of vectors",
        ),
        (
            mse,
            tq.MSECode(code.packed, norms * np.nan),
            "code.norms has a value that is negative or not finite; they are lengths of vectors",
        ),
        (product, code, "code is a MSECode; it must be an InnerProductCode"),
        (product, tq.InnerProductQuantizer(20, 1).quantize(x), "code has one stage; with 3 bits it must have two"),
        (tq.InnerProductQuantizer(20, 1), product.quantize(x), "code has two stages; with 1 bits it must have one"),
        (
            product,
            tq.InnerProductCode(tq.MSEQuantizer(20, 2).quantize(x[:2]), qjl.quantize(x)),
            "code has norms of float64 (2,) and residuals of float64 (3,)",
        ),
        (polar, code, "code is a MSECode; it must be a PolarCode"),
        (
            polar,
            tq.PolarQuantizer(20, (3, 4)).quantize(x),
            "code.angles has shapes [(3, 4), (3, 3)]; they must be of uint8 and [(3, 4), (3, 2)]",
        ),
        (polar, tq.PolarQuantizer(20, (3,)).quantize(x), "code.radii has shape (3, 10); its last axis must be 5"),
        (mixed, code, "code is a MSECode; it must be a MixedCode"),
        (
            mixed,
            tq.MixedCode(mixed.quantize(x).outliers, mixed.quantize(x[:2]).rest),
            "code has outliers of float64 (3,) and a rest of float64 (2,)",
        ),
    ]
    for quantizer, other, text in wrong:
        with pytest.raises(tbq.TBQError, match=f"^{re.escape(text)}$"):
            quantizer.dequantize(other)


# --- the figures ------------------------------------------------------------------------------------------------------


def test_figures(tmp_path, monkeypatch, capsys, demo_model):
    pytest.importorskip("matplotlib", reason="the figures need matplotlib: pip install 'ggml-tbq[plot]'")
    small = dict(SEEDS=2, BITS=range(1, 4), VECTORS=32, QUERIES=8, ROTATION_SEEDS=2, ROTATION_DIMS=(16,))
    for name, value in small.items():
        monkeypatch.setattr(figures, name, value)
    figures.run(tmp_path, 64, demo_model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["turboquant-bias.png", "turboquant-distortion.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20000 for path in tmp_path.iterdir())
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 |")]
    assert len(rows) == 3 and " | 0.117 | " in rows[0] and " | 0.57 | " in rows[1]
    for cell, expected in zip(rows[0].split("|")[5:8], (0.117, 0.117, 0.117)):  # token embeddings too
        assert float(cell.split("±")[0]) == pytest.approx(expected, rel=0.1)


def test_figures_errors(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the figures need matplotlib: pip install 'ggml-tbq[plot]'")

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, figures.__file__, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True
        )
        assert not done.stdout and list(tmp_path.iterdir()) == [tmp_path / "file"]
        return done.returncode, done.stderr

    (tmp_path / "file").write_bytes(b"GGUF")
    assert run("nowhere") == (1, "error: FOLDER 'nowhere' is not a folder that can be written to\n")
    status, said = run(".", "--model", "file")
    assert status == 1 and said.startswith("error: file ") and said.count("\n") == 1
    status, said = run(".", "--dim", "0")
    assert status == 2 and said.endswith("argument --dim: '0' is not a number of at least 1\n")
    status, said = run(".", "--dim", "100000")
    assert (status, said) == (
        1,
        "error: vectors have 100000 values; the figures need dense rotations, which take at most 8192\n",
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(tbq.TBQError, match=r"^the figures need matplotlib: pip install 'ggml-tbq\[plot\]'$"):
        figures.run(tmp_path, 64, None)


def test_documented_figures_are_what_is_computed():
    """Columns "lower bound", "upper bound" and "expected" of docs/measurements/turboquant.md."""
    found = {"squared": [], "product": []}
    for line in (ROOT / "docs" / "measurements" / "turboquant.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.match(r"\| \d \| ", line) and len(cells) in (7, 8):
            found["squared" if len(cells) == 7 else "product"].append([float(cell) for cell in cells[:4]])
    dim = 576
    assert [row[0] for row in found["squared"]] == [row[0] for row in found["product"]] == list(BITS)
    for bits, *stated in found["squared"]:
        assert stated == pytest.approx(
            [tq.mse_lower_bound(bits, dim), tq.mse_upper_bound(bits), tq.mse_distortion(int(bits), dim)], rel=6e-3
        )
    for bits, *stated in found["product"]:
        assert stated == pytest.approx(
            [
                dim * tq.inner_product_lower_bound(bits, dim),
                dim * tq.inner_product_upper_bound(bits, dim),
                dim * tq.inner_product_distortion(int(bits), dim),
            ],
            rel=6e-3,
        )
