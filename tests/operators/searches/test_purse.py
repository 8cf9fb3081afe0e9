from operators.searches.purse import END_S, LOOK_S, Purse


class Costs:
    """A clock, and machines that cost 2 a second."""

    def __init__(self):
        self.now = self.asked = 0

    def spent(self):
        self.asked += 1
        return 2.0 * self.now


def test_no_trial_begins_that_would_pass_it_and_none_goes_on_until_it_does():
    costs = Costs()
    purse = Purse(most=100.0, at_once=2, spent=costs.spent, clock=lambda: costs.now)
    assert not purse.closed()  # of the first ones nobody knows what they cost
    costs.now, purse.ended = 10, 1  # 20 each: with two more it would be 60
    assert not purse.closed()
    costs.now, purse.ended = 32, 2  # 32 each
    assert purse.closed()
    assert not purse.over()
    ahead = LOOK_S + END_S
    costs.now = 50 - ahead
    assert not purse.over()
    costs.now = 50 - ahead + LOOK_S
    assert purse.over()


def test_cheap_trials_end_it_late_and_it_is_not_asked_all_the_time():
    costs = Costs()
    purse = Purse(most=100.0, at_once=1, spent=costs.spent, clock=lambda: costs.now)
    begun = 0
    while not purse.closed():
        begun += 1
        costs.now += 0.5
        purse.ended += 1
    assert 2 * costs.now < 100
    assert begun > 60
    assert costs.asked <= 1 + costs.now / LOOK_S
