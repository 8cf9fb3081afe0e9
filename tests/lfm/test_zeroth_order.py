import torch

from lfm.zeroth_order import forward_differences


def test_an_orthonormal_basis_gives_the_gradient_of_a_linear_function_exactly():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 2, generator=draw, dtype=torch.float64)
    slope = torch.randn(2, 2, generator=draw, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(4, 4, generator=draw, dtype=torch.float64)).Q.view(4, 1, 2, 2)
    found = forward_differences(lambda y: (y * slope).sum(dim=(1, 2)) + 1.5, x, basis.expand(4, 3, 2, 2), step=0.1)
    torch.testing.assert_close(found, slope.expand(3, 2, 2))


def test_it_is_the_mean_over_directions_of_slope_times_direction_times_the_number_of_numbers():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, generator=draw, dtype=torch.float64)
    u = torch.nn.functional.normalize(torch.randn(5, 2, 3, generator=draw, dtype=torch.float64), dim=-1)

    def f(y):
        return y[0] ** 2 + 3 * y[1] * y[2]

    found = forward_differences(lambda ys: torch.stack([f(y) for y in ys]), x, u, step=1e-3)
    for point in range(2):
        wanted = torch.zeros(3, dtype=torch.float64)
        for along in range(5):
            ahead = f(x[point] + 1e-3 * u[along, point])
            wanted += 3 / 5 * (ahead - f(x[point])) / 1e-3 * u[along, point]
        torch.testing.assert_close(found[point], wanted)


def test_in_the_mean_over_many_directions_it_is_the_gradient_of_a_linear_function():
    draw = torch.Generator().manual_seed(2)
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    u = torch.nn.functional.normalize(torch.randn(40_000, 1, 3, generator=draw, dtype=torch.float64), dim=-1)
    found = forward_differences(lambda y: y @ slope, torch.zeros(1, 3, dtype=torch.float64), u, step=1.0)
    torch.testing.assert_close(found[0], slope, atol=0.03, rtol=0)


def test_it_asks_once_about_each_point_and_each_step():
    asked = []

    def f(y):
        asked.append(len(y))
        return y.sum(dim=1)

    forward_differences(f, torch.zeros(4, 3), torch.ones(2, 4, 3) / 3**0.5, step=0.1)
    assert asked == [12]
