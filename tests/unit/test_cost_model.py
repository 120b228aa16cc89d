"""What is read from assembly, and what the cost model makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scripts import benchmark

machine_code, cost = benchmark("machine_code"), benchmark("cost")
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                             /* 0x00000a00ff017b82 */
                                                                                     /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;                   /* 0x0000000402047981 */
        /*0020*/              @!P0 LDG.E.U16.CONSTANT R8, desc[UR4][R2.64] ;          /* 0x0000000402087981 */
        /*0030*/                   FADD R4, R4, R5 ;                                  /* 0x0000000504047221 */
        /*0040*/                   LDG.E R9, desc[UR4][R2.64+0x10] ;                  /* 0x0000100402097981 */
        /*0050*/               @P1 BRA 0x30 ;                                         /* 0xffffffdc00f01947 */
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                      /* 0x0000000000007b1d */
        /*0070*/                   FMUL R4, R4, R5 ;                                  /* 0x0000000504047220 */
        /*0080*/               @P2 BRA 0x10 ;                                         /* 0xffffff8800182947 */
        /*0090*/                   EXIT ;                                             /* 0x000000000000794d */
        /*00a0*/                   BRA 0xa0;                                          /* 0xfffffffc00fc7947 */
        /*00b0*/                   NOP;                                               /* 0x0000000000007918 */
"""
AMDGCN = """
kernel:                                 ; @kernel
; %bb.0:
	s_load_dwordx4 s[0:3], s[0:1], 0x0
	global_load_dwordx4 v[2:5], v0, s[2:3]
.LBB0_1:                                ; %loop
	global_load_ushort v1, v0, s[2:3]
	v_add_f32_e32 v1, v1, v2
	s_cbranch_scc1 .LBB0_1
	s_barrier
	global_load_dword v1, v0, s[2:3]
	s_endpgm
"""
COUNTS = {
    name: cost.ProgramWork(instructions)
    for name, instructions in {
        "_compute_local_logits_stats_kernel": 540, "_rejection_kernel": 400, "_resample_kernel": 250,
        "_insert_resampled_kernel": 120, "target_statistics_kernel": 860, "verdict_kernel": 350,
        "mismatch_kernel": 1_500, "scan_kernel": 1_500, cost.RULE_SCAN: 700,
    }.items()
}  # fmt: skip
H100 = cost.CARDS["H100"]


def test_sass_is_read() -> None:
    code = machine_code.parse_sass(SASS)
    assert code.instructions == 11  # the no-operation behind the program is none of its
    assert code.loads == {128: 1, 16: 1, 32: 1}
    assert code.barriers == 1
    assert code.loops == [3]  # the outer loop holds another; a program's last instruction only stops the processor
    assert code.executed(8) == 11 + 7 * 3


def test_amd_assembly_is_read() -> None:
    code = machine_code.parse_amdgcn(AMDGCN)
    assert (code.instructions, code.loads, code.barriers, code.loops) == (8, {128: 1, 16: 1, 32: 1}, 1, [3])


def test_a_kernel_bound_by_memory_takes_its_bytes_over_the_bandwidth_that_is_reached() -> None:
    kernel = cost.Kernel("reads", 1, 1, 0, bytes=3.35e6 * 0.9 * 100)
    assert cost.microseconds(kernel, H100) == pytest.approx(H100.start + 100)
    half = replace(kernel, cached=kernel.bytes / 2)
    held = 0.6 * 50e6 / (3.35e6 * 0.9)  # microseconds that the cache's share saves
    assert cost.microseconds(half, H100) == pytest.approx(H100.start + 100 - held)


def test_a_kernel_bound_by_instructions_takes_them_over_the_issue_rate() -> None:
    kernel = cost.Kernel("computes", 132_000, 132_000, 1_755, bytes=0)
    assert cost.microseconds(kernel, H100) == pytest.approx(H100.start + 1_000)  # 1,000 programs of 4 warps each


def test_programs_with_nothing_to_do_still_take_their_turns() -> None:
    kernel = cost.Kernel("looks", 0, 132 * 16 * 10, 0, bytes=0)
    assert cost.microseconds(kernel, H100) == pytest.approx(H100.start + 8)  # ten rounds of 0.8


def test_a_step_reads_the_rows_it_is_said_to_read() -> None:
    def rows(which: str, sampled: bool) -> float:
        traffic = cost.VerificationStep(10, sampled)
        return sum(kernel.bytes for kernel in cost.kernels(which, traffic, COUNTS)) / traffic.row / traffic.batch

    # five target rows and, after 0.7^5 of the blocks, the bonus row; two rows for each of 1.5 rejected positions
    assert rows("stock", False) == pytest.approx(5 + 0.7**5)
    assert rows("rule", False) == rows("stock", False)
    assert rows("learned", False) == pytest.approx(5 + 0.7**5 + 3)
    assert rows("stock", True) == pytest.approx(10 + 0.7**5 + 2 * (1 - 0.7**5))


def test_more_requests_take_longer_and_arbitration_is_never_free() -> None:
    for card in cost.CARDS.values():
        times = [cost.step_us("learned", cost.VerificationStep(batch, False), card, COUNTS) for batch in (8, 64, 256)]
        assert times == sorted(times)
        for batch in (8, 64, 256):
            stock, learned = (
                cost.step_us(which, cost.VerificationStep(batch, True), card, COUNTS) for which in ("stock", "learned")
            )
            assert learned > stock


def test_a_branch_that_is_not_taken_does_not_count() -> None:
    name = cost.STOCK_FIRST_PASS
    works = {
        False: {name: cost.ProgramWork(1_300)},
        True: {name: cost.ProgramWork(2_200)},
    }  # 400 greedy, 900 sampled, 900 drafts
    cost.without_the_other_branch(works)
    assert (works[False][name].instructions, works[True][name].instructions) == (400, 1_800)


def test_the_table_of_the_documentation_is_that_of_the_committed_report() -> None:
    rows = cost.estimates(cost.counts_of(json.loads(cost.REPORT.read_text())["offline"]))
    assert cost.markdown(rows) in (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
