"""The cluster section, batch scripts and ranks' places. Run: pytest tests/pipeline/cluster/test_scripts.py"""

from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.launch_environment import become_rank, first_host, set_variables, threads_per_rank
from pipeline.cluster.check import describe_nodes, find_mismatches
from pipeline.cluster.jobs import Job, jobs_of
from pipeline.cluster.script import batch_script, sbatch_options
from tests.helpers.tiny import parse_run, run_tree


def job(folder: Path, name: str, **cluster: Any) -> Job:
    return Job(name, parse_run(run_tree(folder, cluster=cluster), "tiny.yaml"))


def test_each_job_has_its_own_keys_and_those_that_all_share(tmp_path: Path) -> None:
    cluster = {
        "every_job": {"partition": "gpu", "account": "a", "nodes": 2, "gpus_per_node": 4, "sbatch": ["--exclusive"]},
        "tokenize": {"partition": "cpu", "cpus_per_rank": 16, "memory": "64G"},
        "stage1": {"nodes": 8, "time": "1-12:00:00", "sbatch": ["--constraint=h100"]},
    }
    tokenize = sbatch_options(job(tmp_path, "tokenize", **cluster))
    assert {"--partition=cpu", "--account=a", "--nodes=1", "--cpus-per-task=16", "--mem=64G"} <= set(tokenize)
    assert not any("gpu" in option.lower() for option in tokenize if "partition" not in option)
    assert {"--nodes=1", "--ntasks-per-node=1", "--gres=gpu:1"} <= set(
        sbatch_options(job(tmp_path, "prepare", **cluster))
    )
    stage1 = sbatch_options(job(tmp_path, "stage1", **cluster))
    assert {"--partition=gpu", "--nodes=8", "--ntasks-per-node=4", "--gres=gpu:4", "--time=1-12:00:00"} <= set(stage1)
    assert "--constraint=h100" in stage1
    assert "--exclusive" not in stage1
    assert "--exclusive" in sbatch_options(job(tmp_path, "stage2", **cluster))


def test_a_script_has_set_up_lines_and_an_image_before_each_rank(tmp_path: Path) -> None:
    image = {
        "image": "/images/a.sif",
        "image_options": ["--nv", "--bind", "/scratch"],
        "setup": ["module load apptainer"],
    }
    lines = batch_script(job(tmp_path, "stage1", stage1=image)).splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "module load apptainer" in lines
    assert lines[-1].startswith("exec bash ")
    assert "/launch/batch.sh apptainer exec --nv --bind /scratch /images/a.sif bash " in lines[-1]
    assert lines[-1].endswith("/run.sh train.sh train " + str(tmp_path / "runs" / "tiny" / "run.yaml") + " --stage 1")
    assert not any("PYTHON=" in line for line in lines)  # the image's own


def test_a_run_of_one_stage_has_no_job_for_the_other(tmp_path: Path) -> None:
    run = parse_run(run_tree(tmp_path, stage2=None), "tiny.yaml")
    assert [entry.name for entry in jobs_of(run)] == ["tokenize", "prepare", "stage1", "evaluate"]


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"tokenize": {"gpus_per_node": 1}}, "cluster: tokenize.gpus_per_node: tokenizing uses no GPU; remove it"),
        ({"prepare": {"nodes": 2}}, "cluster: prepare.nodes: the job is one process; give it nodes: 1"),
        (
            {"tokenize": {"ranks_per_node": 2}},
            "cluster: tokenize.ranks_per_node: one process uses all cores of a node",
        ),
        ({"stage1": {"time": "a day"}}, "cluster.stage1.time: 'a day' is not a time that SLURM takes; write 24:00:00"),
        ({"stage1": {"sbatch": ["exclusive"]}}, "cluster.stage1.sbatch: 'exclusive' is not an option of sbatch"),
        ({"stage1": {"gpus": 1}}, "cluster.stage1.gpus: unknown key"),
        ({"environment": {"A B": "c"}}, "cluster.environment: 'A B' is not the name of a variable"),
        ({"restart": "always"}, "cluster.restart: 'always' is not allowed; it should be 'requeue' or 'chain'"),
    ],
)
def test_a_mistake_in_the_cluster_section_is_one_line(tmp_path: Path, cluster: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_run(run_tree(tmp_path, cluster=cluster), "tiny.yaml")
    assert f"tiny.yaml: {message}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node[1-2]", "node1"),
        ("node[01-04,7],gpu9", "node01"),
        ("rack[3,5]-n[010-020]", "rack3-n010"),
        ("a,b[1-2]", "a"),
        ("n[3].cluster.org", "n3.cluster.org"),
    ],
)
def test_the_first_host_of_slurms_short_form(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[7-8]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip


def test_a_task_of_srun_becomes_a_rank() -> None:
    first, again = dict(SRUN), {**SRUN, "SLURM_RESTART_COUNT": "1"}
    become_rank(first)
    become_rank(again)
    assert (first["RANK"], first["WORLD_SIZE"], first["LOCAL_RANK"], first["LOCAL_WORLD_SIZE"]) == ("3", "4", "1", "2")
    assert first["MASTER_ADDR"] == "node7"
    assert first["MASTER_PORT"] != again["MASTER_PORT"]  # the last start's may not be free yet


@pytest.mark.parametrize("step", ["4294967290", "4294967291", ""])
def test_a_batch_script_or_a_shell_in_an_allocation_is_no_rank(step: str) -> None:
    environment = {**SRUN, "SLURM_STEP_ID": step}
    become_rank(environment)
    assert "RANK" not in environment


def test_what_mpirun_was_told_comes_before_what_ranks_would_agree() -> None:
    environment = {
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    become_rank(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("1", "2", "0")


def test_the_runs_variables_come_before_the_shells() -> None:
    environment = {"NCCL_DEBUG": "INFO", "OTHER": "kept"}
    set_variables({"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "3"}, environment)
    allocator = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert environment == {"NCCL_DEBUG": "WARN", "OTHER": "kept", "OMP_NUM_THREADS": "3", **allocator}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_allocator_stays(name: str) -> None:
    environment = {name: "max_split_size_mb:128"}
    set_variables({}, environment)
    assert environment == {name: "max_split_size_mb:128"}


def test_threads_are_those_that_slurm_gave() -> None:
    assert threads_per_rank({"SLURM_CPUS_PER_TASK": "6", "LOCAL_WORLD_SIZE": "2"}) == 6


def test_check_calls_out_what_differs_between_nodes_and_within_one() -> None:
    usual = {"device": "GPU", "torch": "2.13.0"}
    found = [{"node": name, **usual} for name in ("n1", "n1", "n2", "n2", "n3", "n3")]
    assert find_mismatches(describe_nodes(found)) == []
    found[2] |= {"torch": "2.12.0"}
    found[4] |= {"device": "old GPU"}
    found[5] |= {"device": "old GPU"}
    assert find_mismatches(describe_nodes(found)) == [
        "device: n3 has old GPU, 2 others have GPU",
        "torch: n2 has 2.12.0 / 2.13.0, 2 others have 2.13.0",
    ]
    assert "ranks: n1 has 1, n2 has 2" in find_mismatches(describe_nodes(found[1:4]))[-1]
