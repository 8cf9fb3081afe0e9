"""The commented profile with which people begin, for each place."""

from cluster.profile import Place

_TOP = """\
# Where pipelines run. 'lfm plan', 'lfm submit' and 'lfm cluster' read this file.
# What a line that begins with '# ' says may be left out: it is the default, or an example.

name: lfm                     # of the cluster: small letters, digits and '-'
"""

_PLACES: dict[Place, str] = {
    "local": """\
place: local                  # processes on this machine

# Where artifacts and runs are kept: a folder below 'shared', or s3://BUCKET/PREFIX.
storage: /var/tmp/lfm
shared: [/]                   # folders that every machine sees; here all are one
""",
    "address": """\
place: address                # a Ray cluster that somebody else starts and ends
address: ray-head:6379        # of Ray itself
dashboard: http://ray-head:8265  # of its dashboard, which takes jobs

# Where artifacts and runs are kept: s3://BUCKET/PREFIX, or a folder below 'shared'.
storage: s3://my-bucket/lfm
# shared: [/nfs]              # folders that every machine sees under the same path

# Where Ray's token is, never the token itself: env:NAME or file:PATH.
token: env:RAY_AUTH_TOKEN
""",
    "kuberay": """\
place: kuberay                # Kubernetes, with KubeRay 1.7 or newer
namespace: default
# service_account: lfm        # of all pods, such as one that may read the bucket

# What everything runs in: Ray 2.60, this project and what it needs.
image: registry.example.com/lfm:0.1.0
# dashboard: http://localhost:8265  # as 'kubectl port-forward' shows it, for 'lfm submit'

# Where artifacts and runs are kept: every pod reads and writes it.
storage: s3://my-bucket/lfm

# Secrets of Kubernetes whose entries become variables, such as AWS_ACCESS_KEY_ID.
# secrets: [lfm-storage]
# Where 'lfm submit' finds Ray's token, never the token itself: env:NAME or file:PATH. KubeRay makes
# one, in a secret with the cluster's name; 'secret:NAME' is one of yours, with the entry 'auth_token'.
token: env:RAY_AUTH_TOKEN
""",
    "aws": """\
place: aws                    # virtual machines that Ray's launcher starts
region: eu-west-1
# zone: eu-west-1a

# What everything runs in: Ray 2.60, this project and what it needs.
image: registry.example.com/lfm:0.1.0

# Where artifacts and runs are kept: every machine reads and writes it.
storage: s3://my-bucket/lfm

# Where Ray's token is, never the token itself: a file, which is copied to the machines
# ('ray get-auth-token --generate' makes this one).
token: file:~/.ray/auth_token
""",
    "gcp": """\
place: gcp                    # virtual machines that Ray's launcher starts
project: my-project
region: europe-west4
zone: europe-west4-a

# What everything runs in: Ray 2.60, this project and what it needs.
image: registry.example.com/lfm:0.1.0

# Where artifacts and runs are kept: every machine reads and writes it.
storage: s3://my-bucket/lfm

# Where Ray's token is, never the token itself: a file, which is copied to the machines
# ('ray get-auth-token --generate' makes this one).
token: file:~/.ray/auth_token
""",
}

_MIDDLE = """
# mlflow: http://mlflow:5000  # where MLflow keeps runs
# pip: [sacremoses]           # packages that are installed on top
# environment: {HF_HOME: /nfs/hub}  # variables of every process; no secrets
drain_s: 90                   # seconds between the word that a machine goes and its end
currency: USD                 # of all prices

# The head: Ray's own processes and the drivers. It is on demand and always there.
"""

_LARGE = """\
head:
  cpus: 4{head}
  memory_gib: 16
  price_per_hour: 0.2
  # steps: true               # let steps compute there too

# All other machines, by the name of their group.
groups:
  cpu:
    cpus: 16{cpu}
    memory_gib: 64
    min_nodes: 0              # how many stay when nobody needs one
    max_nodes: 4
    idle_timeout_s: 60        # after so long one that nobody uses goes
    price_per_hour: 0.8
  gpu:
    cpus: 12{gpu}
    memory_gib: 48
    gpus: 1
    accelerator: L4           # as Ray calls it
    gpu_memory_gib: 24
    tflops: 60                # what a GPU computes in practice, for estimates of time
    max_nodes: 4
    price_per_hour: 1.1
    # labels: {{team: research}}  # of its nodes in Ray
  gpu-spot:
    cpus: 12{gpu}
    memory_gib: 48
    gpus: 1
    accelerator: L4
    gpu_memory_gib: 24
    tflops: 60
    max_nodes: 8
    price_per_hour: 0.4
    market: spot              # these can be taken away at any time
    fallback: gpu             # what stands in when there are none to be had
"""

_SMALL = """\
head:
  cpus: 1
  memory_gib: 2

# All other processes that stand for machines, by the name of their group.
groups:
  cpu:
    cpus: 1
    memory_gib: 4
    min_nodes: 1
    max_nodes: 1
    # labels: {team: research}  # of its nodes in Ray
"""

_TYPES = {
    "aws": {"head": "m7i.xlarge", "cpu": "m7i.4xlarge", "gpu": "g6.4xlarge"},
    "gcp": {"head": "n2-standard-4", "cpu": "n2-standard-16", "gpu": "g2-standard-12"},
}


def template(place: Place) -> str:
    """A profile's text that can be read as it stands, with every field that people change."""
    if place == "local":
        machines = _SMALL
    else:
        types = _TYPES.get(place)
        said = {n: f"\n{' ' * (2 if n == 'head' else 4)}type: {t}" for n, t in types.items()} if types else {}
        machines = _LARGE.format(**{"head": "", "cpu": "", "gpu": "", **said})
    return _TOP + _PLACES[place] + _MIDDLE + machines
