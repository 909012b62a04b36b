# Committed weights in place of a training, and what is exported beside the figures.
if G.evaluates:
    ruleorder: take > train
    rule take: # committed weights in place of a training
        input: COMMITTED + "model.safetensors" # again where the weights are newer
        output: RUN + "/done.json"
        params: of=COMMITTED, run=RUN, y=lambda wc: G.taken(wc.run, wc.seed)
        message: "take {wildcards.run} seed {wildcards.seed}"
        shell:
            "rm -rf {params.run:q}; mkdir -p {params.run:q}; cp {params.of:q}*.* {params.of:q}SHA256SUMS {params.run:q}/; "
            "cp {params.of:q}trained.json {output:q}"

# Exporting is not part of `all`: it replaces committed checkpoints.
rule export:
    input: G.committed_files()
COPY = ( # results, and their answers per image where there are any
    "mkdir -p {params.to:q}; for f in {params.results:q}; do cp \"$f\" {params.to:q}/; g=\"${{f%.json}}.npz\"; "
    "[ ! -f \"$g\" ] || cp \"$g\" {params.to:q}/; done")
if G.evaluates:
    rule export_run: # the weights are those that are committed
        input: rules.evaluate.output, lambda wc: G.committed_results(wc.run, wc.seed)
        output: COMMITTED + "eval/probe.json"
        params: to=COMMITTED + "eval", results=lambda wc, input: list(input)
        shell: COPY
else:
    rule export_run:
        input: RUN + "/done.json", rules.evaluate.output, lambda wc: G.committed_results(wc.run, wc.seed)
        output: COMMITTED + "eval/probe.json" # alone: what is an output is removed first, and weights are kept where this fails
        params: run=RUN, to=COMMITTED, only=lambda wc: "--teacher" if G.all_runs[wc.run].get("export") == "teacher" else ""
        shell: "{CLI} export {params.run} {params.to} {params.only} && touch {output:q}"
    rule export_results: # of runs whose weights are not committed; done.json has their checksum
        input:
            RUN + "/done.json", rules.evaluate.output, lambda wc: G.committed_results(wc.run, wc.seed),
            figures=lambda wc: [f"{FIGS}/{f}.json" for f in G.measuring_figures(wc.run)],
        output: COMMITTED + "done.json"
        params:
            run=RUN, whole=COMMITTED, to=COMMITTED + "eval",
            results=lambda wc, input: input[1:len(input)-len(input.figures)] + G.kept_results(wc.run, wc.seed),
        shell: "rm -rf {params.whole:q}; " + COPY + "; cp {params.run:q}/config.yaml {params.run:q}/log.jsonl {params.whole:q}; cp {input[0]:q} {output:q}"
rule export_ranks:
    input: rules.rank.output, COMMITTED + "eval/probe.json"
    output: COMMITTED + "eval/ranks.json"
    params: results=RUN + "/eval", to=COMMITTED + "eval/"
    shell: "cp {input[0]:q} {output:q} && find {params.results:q} -name 'probe_step_*' -print0 | xargs -0r cp -t {params.to}"
rule export_baselines:
    input: G.committed_baselines()
    output: [G.committed_path(f) for f in G.committed_baselines()]
    params: to=f"{FIGS}/checkpoints/baselines", results=lambda wc, input: list(input)
    shell: COPY
