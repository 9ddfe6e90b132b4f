def get(name):
    from experiments import cli
    return cli.named(name)
