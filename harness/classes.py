"""Classes of a run that starts from another one's weights (train.init_from), in stage 2.

    match_classes   start tokens by the names of their classes
"""


from gpt import CodeTransformer
from harness.log import new_ones
from harness.models import class_names, run_config


def match_classes(run, folder, model, state):
    """Makes the tables with start tokens in `state`, of the run in `folder`, fit the model: a start
    token is that of the class of the same name, or the model's own if there is none. Returns words
    about it."""
    settings = run_config(folder)["model"]
    source = CodeTransformer(settings["num_classes"], settings["label_dropout"])
    ours = run.dataset.classes[:model.num_classes]
    ours = ours + ["the null class"] * (model.num_starts - model.num_classes)
    theirs = class_names(folder) or [str(i) for i in range(source.num_classes)]
    theirs += ["the null class"] * (source.num_starts - source.num_classes)
    to = [i for i, name in enumerate(ours) if name in theirs]
    of = [theirs.index(ours[i]) for i in to]
    for key, before in model.start_tables().items():
        table = model.state_dict()[key].cpu().clone()
        other = state.pop(key, table[:0])
        our_sizes = [size for rows in before for size in (rows, model.num_starts)]
        their_sizes = [size for rows in before for size in (rows, source.num_starts)]
        if other.shape != (sum(their_sizes), table.shape[1]):
            continue  # of another codebook, grid or width
        our_parts = table.split(our_sizes)
        their_parts = other.split(their_sizes)
        for own, new in zip(our_parts[::2], their_parts[::2]):  # other tokens
            own.copy_(new)
        for own, new in zip(our_parts[1::2], their_parts[1::2]):  # start tokens
            own[to] = new[of]
        state[key] = table
    new = [name for name in ours if name not in theirs]
    return f"; {len(to)} of {len(ours)} start tokens{new_ones(new)}"
