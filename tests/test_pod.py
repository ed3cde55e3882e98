"""What benchmarks.pod reads in a TPU's compiled program."""

from benchmarks.pod import collectives

PROGRAM = """
%all-reduce-scatter.1 (input: f32[64,32]) -> f32[8,32] {
  %pad = f32[64,32]{1,0} pad(%input), padding=0_0
  %all-reduce.7 = f32[64,32]{1,0:T(8,128)} all-reduce(%pad), replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %slice = f32[8,32]{1,0} dynamic-slice(%all-reduce.7, %i)
}

%fused_computation.3 (param_0: bf16[8,32]) -> bf16[64,32] {
  ROOT %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%param_0), dimensions={0}, frontend_attributes={chain_id="4"}
}

%async_collective_fusion.9 (param_0: bf16[8,32]) -> bf16[64,32] {
  ROOT %all-gather.2 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%param_0), dimensions={0}, frontend_attributes={chain_id="4"}
}

ENTRY %main (a: f32[8,32], b: bf16[8,16]) -> f32[] {
  %all-gather.3 = bf16[64,16]{1,0} all-gather(%b), dimensions={0}, frontend_attributes={chain_id="5"}
  %start = (f32[1,32]{1,0}, f32[8,32]{1,0}) all-gather-start(%c), dimensions={0}
  %done = f32[8,32]{1,0} all-gather-done(%start)
  %rs = f32[4,8]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %rs2 = f32[4,8]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[8], dimensions={0}
  %rs3 = f32[4,8]{1,0} reduce-scatter(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  %flag = pred[] all-reduce(%p), to_apply=%and
  %r = bf16[4]{0} ragged-all-to-all(%q)
  ROOT %sum = (f32[], f32[16]{0}, /*index=2*/f32[3]{0}) all-reduce(%l, %m, %n), to_apply=%add
}
"""  # noqa: E501


def test_whole_arrays_are_counted_once():
    assert collectives(PROGRAM) == {
        "all-gather bf16": (2, 2 * (64 * 32 + 64 * 16)),
        "all-gather f32": (1, 4 * 8 * 32),
        "all-reduce pred": (1, 1),
        "ragged-all-to-all bf16": (1, 2 * 4),
        "all-reduce f32": (3, 4 * (1 + 16 + 3)),
        "reduce-scatter f32": (4, 4 * (64 * 32 + 4 * 4 * 8 + 2 * 4 * 8 + 4 * 4 * 8)),
    }
