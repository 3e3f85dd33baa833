"""The commands: what each does in a line, so that `--help` needs to import none of them."""

# Name -> the first paragraph of the command's help; its module has its name.
COMMANDS = {
    "demo": "Train, release and ask under encryption, on handwritten digits: everything in one go, in about a minute.",
    "train": "Train a model whose secured tasks answer truly only to their keys.",
    "evaluate": "Measure a run on its test part: no key, right key, wrong keys, all keys; and guesses of the keys.",
    "attack": "Attack a run: guess and invert keys, infer closed tasks, fine-tune the stolen trunk, tell members.",
    "report": (
        "Report on a run in one HTML page and its JSON: accuracy, leaks, attacks, guarantees, costs, threat model."
    ),
    "export": "Release a run's model as a bundle: manifest.json and cloud.onnx.",
    "predict": "Ask a model under encryption: this process sees X and the scores, and neither weights nor keys.",
    "check": "Tell whether a model runs under encryption, and what a prediction costs.",
}
KEYS_COMMANDS = {
    "list": "Show of each key its task, its model and whether it is locked; never what it is.",
    "lock": "Encrypt keys under a new passphrase (scrypt, AES-256-GCM), each file whole or not at all.",
    "grant": "Let a user open the tasks of keys; running authorities honour it from their next request on.",
    "revoke": "Revoke the grants that match all that is given; they hold no more from an authority's next request on.",
    "grants": "Show all grants, those past included, and how many samples were asked under each.",
    "log": "Show who used which key when, and what was refused. Exit status 3 where the log is not as it was written.",
}
