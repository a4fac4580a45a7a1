//! Threads that run the endpoint's jobs, and the system's randomness.

use std::num::NonZero;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::Builder;

use postern_ike::Random;
use postern_ike::job::{Done, Job, JobId};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::mpsc::UnboundedSender;
use tracing::error;

/// The system's random source.
#[derive(Clone, Debug)]
pub struct System(SystemRandom);

impl Default for System {
    fn default() -> Self {
        Self(SystemRandom::new())
    }
}

impl Random for System {
    fn fill(&mut self, out: &mut [u8]) {
        if self.0.fill(out).is_err() {
            // Keys that can be guessed are worse than no gateway.
            error!("the system gives no random numbers");
            std::process::abort();
        }
    }
}

/// The threads. They end when this is dropped, each after the job that it has.
#[derive(Debug)]
pub struct Jobs {
    queue: mpsc::Sender<(JobId, Job)>,
}

impl Jobs {
    /// Starts `threads` of them; results go to `done`. The queue's length is bounded by the endpoint's half-open limit:
    /// an IKE SA waits for its job before it gives out another.
    pub fn start(threads: NonZero<usize>, done: &UnboundedSender<(JobId, Done)>) -> std::io::Result<Self> {
        let (queue, jobs) = mpsc::channel();
        let jobs = Arc::new(Mutex::new(jobs));
        for number in 0..threads.get() {
            let (jobs, done) = (Arc::clone(&jobs), done.clone());
            Builder::new().name(format!("ike-job-{number}")).spawn(move || work(&jobs, &done))?;
        }
        Ok(Self { queue })
    }

    /// Has `job` done.
    pub fn run(&self, id: JobId, job: Job) {
        if self.queue.send((id, job)).is_err() {
            // Only if every thread has panicked: the job's SA times out.
            error!("the threads for key exchanges and signatures are gone");
        }
    }
}

fn work(jobs: &Mutex<mpsc::Receiver<(JobId, Job)>>, done: &UnboundedSender<(JobId, Done)>) {
    let mut random = System::default();
    loop {
        // The lock is held while waiting: the others wait for the lock then, which is the same.
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((id, job)) = job else { return };
        if done.send((id, job.run(&mut random))).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use postern_ike::message::registry::KeMethod;
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    /// IKE-4: two sides that run their jobs on threads come to the same secret.
    #[test]
    fn ike_4_jobs_are_run() {
        let (sender, mut done) = unbounded_channel();
        let jobs = Jobs::start(NonZero::new(2).unwrap(), &sender).unwrap();
        jobs.run(JobId(1), Job::Generate(KeMethod::CURVE25519));
        let Some((JobId(1), Done::Generated(Ok((own, public))))) = done.blocking_recv() else { panic!() };
        jobs.run(JobId(2), Job::Respond { method: KeMethod::CURVE25519, public });
        let Some((JobId(2), Done::Responded(Ok((public, ours))))) = done.blocking_recv() else { panic!() };
        jobs.run(JobId(3), Job::Agree { own, public });
        let Some((JobId(3), Done::Agreed(Ok(theirs)))) = done.blocking_recv() else { panic!() };
        assert!(ours == theirs);
        drop((jobs, sender));
        assert!(done.blocking_recv().is_none(), "the threads have ended");
    }
}
