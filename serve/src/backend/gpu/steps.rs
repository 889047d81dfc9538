//! The course of a step: decode, which is a graph, or prefill.

use std::slice;

use super::{
    Gpu,
    attention::Attention,
    buckets::{Bucket, Graph, Launched},
    measure::GraphTime,
    memory::Pinned,
    network::{Head, Pass},
    products::HeadProduct,
    ring::{InFlight, LookedAt},
    tables::Uploaded,
};
use crate::{
    Result,
    backend::{Output, Sample, Step, StepToken, graph, sampler},
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

    /// Enqueues a step that has tokens.
    pub(super) fn compute(&mut self, step: &Step<'_>) -> Result<()> {
        let at = self.ring.last().map_or(&[][..], |last| &last.at);
        self.tokens.set(&self.cuda, step.tokens, step.tokens.len().next_power_of_two(), at)?;
        loop {
            let computed = self.enqueue_kernels(step);
            let Err(error) = &computed else { return computed };
            if !error.downcast_ref().is_some_and(Attention::is_too_small) {
                return computed;
            }
            self.forget_graphs();
            if !self.attention.grow(&self.network.stream)? {
                return computed;
            }
        }
    }

    fn enqueue_kernels(&mut self, step: &Step<'_>) -> Result<()> {
        self.at.clear();
        let rows = step.tokens.len();
        let padded_rows = rows.next_power_of_two();
        let bucket = padded_rows.ilog2() as usize;
        if self.tables.reserve(step.batch, padded_rows)? {
            self.forget_graphs();
        }
        let uploaded = self.tables.upload(step.batch, &mut self.cache, padded_rows)?;
        self.prepare_products(bucket, uploaded == Uploaded::Decode)?;
        match uploaded {
            Uploaded::Decode => self.decode(bucket, step.outputs),
            Uploaded::Prefill => self.prefill(rows, bucket, step.outputs),
        }
    }

    /// A step of one new token for each request, filled up to a bucket: a graph.
    fn decode(&mut self, bucket: usize, outputs: &[Output]) -> Result<()> {
        self.at.extend(outputs.iter().map(|output| output.row));
        let sampled = self.prepare_outputs(bucket, true, outputs)?;
        let rows = 1 << bucket;
        let Self {
            buckets,
            network,
            attention,
            buffers,
            multiplier,
            outputs,
            tokens,
            chosen,
            ring,
            cache,
            tables,
            sampler,
            ..
        } = self;
        let (cuda, graph_times) = (&self.cuda, &mut self.graph_times);
        let Bucket { greedy, sampled: sampling, products: Some(products), head: Some(head) } =
            &mut buckets[bucket]
        else {
            return Err("the products of a step were not made".into());
        };
        let (captured, sampler) = if sampled { (sampling, sampler.as_mut()) } else { (greedy, None) };
        let tables = &tables.tables;
        let plans = attention.plan_decode(&tables.pages, self.graphs.then_some(rows))?;
        let keys = plans.replay_keys();
        ring.wait_for_copies(cuda)?;
        let place = keys.as_ref().and_then(|keys| captured.position(keys));
        if let Some((place, step)) = place.and_then(|place| Some((place, captured.get(place)?))) {
            let launch = || Ok(step.launch(plans.decode())?);
            match graph_times {
                Some(times) => times.push(GraphTime::of(cuda, launch)?),
                None => launch()?,
            }
            self.launched = Some(Launched { bucket, sampled, place });
            return Ok(());
        }
        let (padded_rows, plans, tokens) = (rows, &plans, &*tokens);
        let mut pass =
            Pass { rows, padded_rows, tokens, chosen, tables, plans, products, cache, buffers, multiplier };
        let mut head = Head { rows, selected: None, product: &head.product, outputs, sampler };
        let mut run = || {
            network.run(&mut pass)?;
            network.head(&mut pass, &mut head)
        };
        // This step runs without a graph, which loads all kernels.
        run()?;
        if let Some(keys) = keys {
            // SAFETY: what is not the crate's works on weights, buffers, outputs, tokens and
            // the sampler of `self`, which are dropped, or replaced, after the graphs.
            let step = unsafe { graph::capture(&network.stream, run)? };
            let place = captured.push(Graph { keys, step });
            self.launched = Some(Launched { bucket, sampled, place });
        }
        Ok(())
    }

    /// A step of any new tokens.
    fn prefill(&mut self, rows: usize, bucket: usize, outputs: &[Output]) -> Result<()> {
        self.at.extend(0..outputs.len());
        let wanted = (!outputs.is_empty()).then(|| outputs.len().next_power_of_two());
        let mut sampled = false;
        if let Some(wanted) = wanted {
            sampled = self.prepare_outputs(wanted.ilog2() as usize, false, outputs)?;
            let selected: Vec<_> = outputs.iter().map(|output| output.row).collect();
            self.selected.set(&self.cuda, &selected, wanted)?;
        }
        let Self {
            buckets,
            network,
            attention,
            buffers,
            multiplier,
            tokens,
            chosen,
            ring,
            cache,
            tables,
            selected,
            sampler,
            ..
        } = self;
        let Some(products) = &buckets[bucket].products else {
            return Err("the products of a step were not made".into());
        };
        let plans = match &tables.rows {
            Some(pages) => attention.plan_decode(pages, None)?,
            None => attention.plan_prefill(&tables.tables)?,
        };
        let tables = &tables.tables;
        let padded_rows = 1 << bucket;
        let (plans, tokens) = (&plans, &*tokens);
        ring.wait_for_copies(&self.cuda)?;
        let mut pass =
            Pass { rows, padded_rows, tokens, chosen, tables, plans, products, cache, buffers, multiplier };
        network.run(&mut pass)?;
        let Some(rows) = wanted else { return Ok(()) };
        let Some(HeadProduct { product, .. }) = &buckets[rows.ilog2() as usize].head else {
            return Err("the products of a step were not made".into());
        };
        let sampler = sampler.as_mut().filter(|_| sampled);
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
