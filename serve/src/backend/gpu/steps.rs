//! The course of a step: decode, which is a graph, or prefill.

use std::slice;

use flashinfer_rs::gpu::Tensor;

use super::{
    Gpu,
    attention::Attention,
    breakdown::Breakdown,
    buckets::{Bucket, Graph, Launched},
    lanes::{LANES, Lane},
    measure::GraphTime,
    memory::Pinned,
    network::{Head, Pass},
    products::HeadProduct,
    ring::{InFlight, LookedAt},
    tables::{Decode, Uploaded},
};
use crate::{
    Result,
    backend::{Sample, Step, StepToken, graph, sampler},
};

impl Gpu {
    /// Refuses what is no step.
    pub(super) fn check(&self, step: &Step<'_>) -> Result<()> {
        let rows = step.tokens.len();
        if rows != step.batch.queries().total() || step.outputs.iter().any(|output| output.row >= rows) {
            return Err("the tokens or outputs of a step are not those of its batch".into());
        }
        if step.outputs.windows(2).any(|pair| pair[0].row >= pair[1].row) {
            return Err("the outputs of a step are not in ascending order of their rows".into());
        }
        let most = self.max_rows();
        if rows > most {
            return Err(format!("a step of {rows} tokens; the engine was made for {most}").into());
        }
        let vocab_size = self.network.config.vocab_size;
        let chosen = self.ring.last().map_or(0, |last| last.at.len());
        for token in step.tokens {
            match *token {
                StepToken::Known(token) if token as usize >= vocab_size => {
                    return Err(format!("there is no token {token}").into());
                }
                StepToken::Chosen(output) if output >= chosen => {
                    return Err(
                        format!("the step before, of {chosen} outputs, has no output {output}").into()
                    );
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Enqueues a step that has tokens, with the memory of a lane.
    pub(super) fn compute(&mut self, step: &Step<'_>, lane: usize) -> Result<()> {
        loop {
            let computed = self.enqueue_kernels(step, lane);
            let Err(error) = &computed else { return computed };
            // Some may have been begun.
            self.uploads.finish(&self.cuda)?;
            if !error.downcast_ref().is_some_and(Attention::is_too_small) {
                return computed;
            }
            self.forget_graphs();
            if !self.attention.grow(&self.network.stream)? {
                return computed;
            }
        }
    }

    fn enqueue_kernels(&mut self, step: &Step<'_>, lane: usize) -> Result<()> {
        self.at.clear();
        let rows = step.tokens.len();
        let padded_rows = rows.next_power_of_two();
        let bucket = padded_rows.ilog2() as usize;
        if self.lanes[lane].tables.reserve(step.batch, padded_rows)? {
            self.forget_graphs();
        }
        // What rows gain by being decode is a graph.
        let decode = Decode::of(step.batch, step.outputs.len());
        let decode = decode.filter(|decode| self.graphs || *decode == Decode::ByRequest);
        let mut uploaded = Uploaded::Prefill;
        if let Some(decode) = decode {
            self.cache.copy_pages()?;
            let Self { uploads, lanes, cache, .. } = self;
            let Lane { tables, computed, .. } = &mut lanes[lane];
            uploads.begin(&self.cuda, computed)?;
            uploaded = uploads.make(|_| tables.upload_decode(decode, step.batch, cache, padded_rows))?;
        }
        self.prepare_products(bucket, uploaded == Uploaded::Decode)?;
        match uploaded {
            Uploaded::Decode => self.decode(step, lane, bucket),
            Uploaded::Prefill => {
                self.uploads.finish(&self.cuda)?;
                self.lanes[lane].tables.upload_prefill(step.batch, &mut self.cache)?;
                self.prefill(step, lane, bucket)
            }
        }
    }

    /// A step of one new token for each request, or of rows that are requests of their own, filled up
    /// to a bucket: a graph.
    fn decode(&mut self, step: &Step<'_>, lane: usize, bucket: usize) -> Result<()> {
        self.at.extend(step.outputs.iter().map(|output| output.row));
        let sampled = self.prepare_outputs(bucket, true, step.outputs)?;
        let rows = 1 << bucket;
        let Self {
            buckets,
            network,
            attention,
            buffers,
            multiplier,
            outputs,
            lanes,
            uploads,
            ring,
            cache,
            at,
            ..
        } = self;
        let (cuda, graph_times, graphs) = (&self.cuda, &mut self.graph_times, self.graphs);
        let breakdown = self.breaks_down.then_some(&mut self.breakdown);
        let Bucket { greedy, sampled: sampling, products: Some(products), head: Some(head) } =
            &mut buckets[bucket]
        else {
            return Err("the products of a step were not made".into());
        };
        let captured = if sampled { &mut sampling[lane] } else { &mut greedy[lane] };
        let (Lane { tokens, chosen, sampler, tables, computed, .. }, chosen_before) = of_lane(lanes, lane);
        let mut sampler = sampler.as_mut().filter(|_| sampled);
        let tables = &tables.tables;
        // What was made just now is there then.
        uploads.begin(cuda, computed)?;
        let plans = uploads.make(|beside| -> Result<_> {
            let before = ring.last().map_or(&[][..], |last| &last.at);
            tokens.set(beside, step.tokens, rows, before)?;
            if let Some(sampler) = &mut sampler {
                sampler.set(beside, step, at, rows, before)?;
            }
            Ok(attention.plan_decode(lane, &tables.pages, graphs.then_some(rows))?)
        })?;
        uploads.finish(cuda)?;
        let keys = plans.replay_keys();
        let place = keys.as_ref().and_then(|keys| captured.position(keys));
        if let Some((place, graph)) = place.and_then(|place| Some((place, captured.get(place)?))) {
            let launch = || Ok(graph.step.launch(plans.decode())?);
            match graph_times {
                Some(times) => times.push(GraphTime::of(cuda, launch)?),
                None => launch()?,
            }
            self.launched = Some(Launched { bucket, sampled, place });
            return Ok(());
        }
        let (padded_rows, plans, tokens) = (rows, &plans, &*tokens);
        let mut pass = Pass {
            rows,
            padded_rows,
            tokens,
            chosen_before,
            chosen,
            tables,
            plans,
            products,
            cache,
            buffers,
            multiplier,
        };
        let mut head = Head { rows, selected: None, product: &head.product, outputs, sampler };
        let mut run = || {
            network.run(&mut pass)?;
            network.head(&mut pass, &mut head)
        };
        // This step runs without a graph, which loads all kernels.
        run()?;
        if let Some(breakdown) = breakdown {
            // SAFETY: as below; no kernel here takes an address, or the end of a loop, from numbers that
            // another one computes without looking at its bounds.
            *breakdown = Some(unsafe { Breakdown::of(cuda, &mut run)? });
        }
        if let Some(keys) = keys {
            // SAFETY: what is not the crate's works on weights, buffers, outputs, tokens and samplers of
            // lanes, and communicators of `self`, which are dropped, or replaced, after the graphs.
            let step = unsafe { graph::capture(&network.stream, run)? };
            let place = captured.push(Graph { keys, step });
            self.launched = Some(Launched { bucket, sampled, place });
        }
        Ok(())
    }

    /// A step of any new tokens. Its uploads are made in the order of the stream.
    fn prefill(&mut self, step: &Step<'_>, lane: usize, bucket: usize) -> Result<()> {
        let (outputs, rows, padded_rows) = (step.outputs, step.tokens.len(), 1 << bucket);
        self.at.extend(0..outputs.len());
        let wanted = (!outputs.is_empty()).then(|| outputs.len().next_power_of_two());
        let mut sampled = false;
        if let Some(wanted) = wanted {
            sampled = self.prepare_outputs(wanted.ilog2() as usize, false, outputs)?;
        }
        let Self { buckets, network, attention, buffers, multiplier, lanes, ring, cache, at, .. } = self;
        let Some(products) = &buckets[bucket].products else {
            return Err("the products of a step were not made".into());
        };
        let (Lane { tokens, chosen, selected, sampler, tables, .. }, chosen_before) = of_lane(lanes, lane);
        let mut sampler = sampler.as_mut().filter(|_| sampled);
        let before = ring.last().map_or(&[][..], |last| &last.at);
        tokens.set(&self.cuda, step.tokens, padded_rows, before)?;
        if let Some(wanted) = wanted {
            let rows: Vec<_> = outputs.iter().map(|output| output.row).collect();
            selected.set(&self.cuda, &rows, wanted)?;
            if let Some(sampler) = &mut sampler {
                sampler.set(&self.cuda, step, at, wanted, before)?;
            }
        }
        let plans = match &tables.rows {
            Some(pages) => attention.plan_decode(lane, pages, None)?,
            None => attention.plan_prefill(lane, &tables.tables)?,
        };
        let tables = &tables.tables;
        let (plans, tokens) = (&plans, &*tokens);
        let mut pass = Pass {
            rows,
            padded_rows,
            tokens,
            chosen_before,
            chosen,
            tables,
            plans,
            products,
            cache,
            buffers,
            multiplier,
        };
        network.run(&mut pass)?;
        let Some(rows) = wanted else { return Ok(()) };
        let Some(HeadProduct { product, .. }) = &buckets[rows.ilog2() as usize].head else {
            return Err("the products of a step were not made".into());
        };
        let selected = Some(&*selected);
        network.head(&mut pass, &mut Head { rows, selected, product, outputs: &mut self.outputs, sampler })
    }

    /// What came of the outputs of a step, once it is computed.
    pub(super) fn samples(&mut self, step: &InFlight) -> Result<Vec<Sample>> {
        let (chosen, vocab_size) = (step.chosen()?, self.network.config.vocab_size);
        let sample = |at: &usize| Sample { token: u32::try_from(chosen[*at]).ok(), logprobs: None };
        let mut samples: Vec<_> = step.at.iter().map(sample).collect();
        for LookedAt { index, output } in &step.looked_at {
            let row = match &mut self.row {
                Some(row) => row,
                empty => empty.insert(Pinned::zeros(&self.cuda, vocab_size)?),
            };
            row.download(&self.cuda, &self.outputs.logits, step.at[*index] * vocab_size, vocab_size)?;
            let (row, sample) = (row.as_slice()?, &mut samples[*index]);
            if output.allowed.is_some() {
                let chosen = sampler::sample(slice::from_ref(output), row, vocab_size)?;
                chosen.into_iter().for_each(|chosen| *sample = chosen);
            } else {
                let wanted = sample.token.zip(output.logprobs);
                sample.logprobs = wanted.map(|(token, count)| sampler::logprobs(row, token, count));
            }
        }
        Ok(samples)
    }
}

/// A lane, and what the step before, which was the other's, chose.
fn of_lane(lanes: &mut [Lane; LANES], lane: usize) -> (&mut Lane, &Tensor<i32>) {
    let [first, second] = lanes;
    match lane {
        0 => (first, &second.chosen),
        _ => (second, &first.chosen),
    }
}
