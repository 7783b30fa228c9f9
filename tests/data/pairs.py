"""What several tests of data files read from a result."""


def texts(data):
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in data.pairs]
