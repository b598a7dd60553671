{{/* What one value alone cannot show: sums and pairs. Each message says what is given and what to set. */}}
{{- define "lowbit.check" -}}
{{- if not .Values.enabled -}}
{{- fail "enabled is false, which only a parent chart can follow: give the dependency `condition: lowbit.enabled`, or uninstall the release" -}}
{{- end -}}
{{- if eq .Values.image.tag "latest" -}}
{{- fail "image.tag is latest, which names another image tomorrow; give a version, or set image.digest" -}}
{{- end -}}
{{- include "lowbit.checkParallel" . -}}
{{- include "lowbit.checkShutdown" . -}}
{{- include "lowbit.checkCheckpoint" . -}}
{{- include "lowbit.checkKeys" . -}}
{{- include "lowbit.checkScaling" . -}}
{{- include "lowbit.checkService" . -}}
{{- include "lowbit.checkTls" . -}}
{{- include "lowbit.checkLoadtest" . -}}
{{- include "lowbit.checkPods" . -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.enabled needs ingress.host" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled needs httpRoute.parentRefs: the gateway that carries the route" -}}
{{- end -}}
{{- if and (eq (int .Values.gpu.count) 0) .Values.server.gpuMemoryUtilization -}}
{{- fail "server.gpuMemoryUtilization is for GPUs and gpu.count is 0; set server.kvCacheGib" -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkParallel" -}}
{{- $nodes := int .Values.parallel.nodes -}}
{{- $each := max 1 (int .Values.gpu.count) | int -}}
{{- $tensor := include "lowbit.tensorSize" . | int -}}
{{- $pipeline := include "lowbit.pipelineSize" . | int -}}
{{- if ne (mul $nodes $each | int) (mul $tensor $pipeline | int) -}}
{{- fail (printf "gpu.count %d x parallel.nodes %d = %d devices, but parallel.tensorSize %d x parallel.pipelineSize %d = %d; each device holds exactly one part of the model" $each $nodes (mul $each $nodes) $tensor $pipeline (mul $tensor $pipeline)) -}}
{{- end -}}
{{- $vendor := regexMatch "^(nvidia|amd)[.]com/" .Values.gpu.resourceName -}}
{{- if and (gt (int .Values.gpu.count) 0) (not (or $vendor .Values.image.tag .Values.image.digest)) -}}
{{- fail (printf "gpu.resourceName is %s and says neither nvidia.com nor amd.com: no image is known for it; set image.tag or image.digest" .Values.gpu.resourceName) -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkShutdown" -}}
{{- $preStop := int .Values.shutdown.preStopS -}}
{{- $drain := int .Values.server.drainTimeoutS -}}
{{- $grace := int .Values.shutdown.terminationGracePeriodS -}}
{{- $sum := add $preStop $drain 20 | int -}}
{{- if le $grace $sum -}}
{{- fail (printf "shutdown.terminationGracePeriodS is %d and must exceed shutdown.preStopS %d + server.drainTimeoutS %d + 20 for the engine to stop = %d: Kubernetes would kill requests that are still being answered; set at least %d" $grace $preStop $drain $sum (add $sum 10)) -}}
{{- end -}}
{{- if and (eq (toString .Values.rollout.maxSurge | trimSuffix "%") "0") (eq (toString .Values.rollout.maxUnavailable | trimSuffix "%") "0") -}}
{{- fail "rollout.maxSurge and rollout.maxUnavailable are both 0: no pod could ever be replaced; set one of them to 1" -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkCheckpoint" -}}
{{- $claim := .Values.checkpoint.existingClaim -}}
{{- $image := .Values.checkpoint.image.reference -}}
{{- $hub := .Values.checkpoint.hub.id -}}
{{- $given := compact (list $claim $image $hub) -}}
{{- if gt (len $given) 1 -}}
{{- fail (printf "checkpoint is given more than once: %s; give one of existingClaim, image.reference and hub.id" (join " and " $given)) -}}
{{- end -}}
{{- if not $given -}}
{{- fail "checkpoint: give existingClaim (a PersistentVolumeClaim), image.reference (an OCI image) or hub.id (OWNER/NAME@REVISION); none is set" -}}
{{- end -}}
{{- if .Values.quantize.enabled -}}
{{- if not (and $claim .Values.checkpoint.path) -}}
{{- fail "quantize.enabled needs checkpoint.existingClaim and checkpoint.path, the directory in the claim that it writes" -}}
{{- end -}}
{{- if not .Values.quantize.model -}}
{{- fail "quantize.enabled needs quantize.model: OWNER/NAME@REVISION, or a path inside the claim that starts with /checkpoint/" -}}
{{- end -}}
{{- if not .Values.quantize.resources -}}
{{- fail "quantize.enabled needs quantize.resources with requests.cpu, requests.memory and limits.memory" -}}
{{- end -}}
{{- if and (gt (int .Values.quantize.pods) 1) (gt (int .Values.quantize.ranks) 1) -}}
{{- fail (printf "quantize.pods is %d and quantize.ranks %d: each of several pods is one rank; set ranks to 1, and pods to as many as there are GPUs" (int .Values.quantize.pods) (int .Values.quantize.ranks)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkKeys" -}}
{{- if and .Values.apiKeys.existingSecret .Values.apiKeys.entries -}}
{{- fail "apiKeys.existingSecret and apiKeys.entries are both set; give one of them" -}}
{{- end -}}
{{- if include "lowbit.keysSecret" . -}}
{{- if and .Values.monitoring.serviceMonitor.enabled (not .Values.monitoring.scrapeKey.existingSecret) -}}
{{- fail "with API keys, /metrics answers admin keys only: monitoring.serviceMonitor needs monitoring.scrapeKey.existingSecret" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkScaling" -}}
{{- with .Values.autoscaling -}}
{{- if ne .mode "none" -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas %d is above autoscaling.maxReplicas %d" (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if and (eq .mode "hpa") (eq (int .minReplicas) 0) -}}
{{- fail "autoscaling.minReplicas is 0, which an HPA does not do; set 1, or mode keda" -}}
{{- end -}}
{{- if eq .mode "keda" -}}
{{- if not .keda.prometheusAddress -}}
{{- fail "autoscaling.mode keda needs autoscaling.keda.prometheusAddress, the URL of a Prometheus" -}}
{{- end -}}
{{- if and (eq (int .minReplicas) 0) (not .keda.triggers) -}}
{{- fail "autoscaling.minReplicas is 0: no pod has a queue then, and nothing would start one; give autoscaling.keda.triggers a trigger that sees requests outside the pods, or set 1" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkService" -}}
{{- with .Values.service -}}
{{- if and .nodePort (eq .type "ClusterIP") -}}
{{- fail (printf "service.nodePort is %d and service.type ClusterIP has none; set service.type NodePort or LoadBalancer" (int .nodePort)) -}}
{{- end -}}
{{- if and .externalTrafficPolicy (eq .type "ClusterIP") -}}
{{- fail "service.externalTrafficPolicy needs service.type NodePort or LoadBalancer; it is ClusterIP" -}}
{{- end -}}
{{- if ne .type "LoadBalancer" -}}
{{- range $key := list "loadBalancerClass" "loadBalancerIP" "loadBalancerSourceRanges" -}}
{{- if get $.Values.service $key -}}
{{- fail (printf "service.%s needs service.type LoadBalancer; it is %s" $key $.Values.service.type) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (gt (len .ipFamilies) 1) (not (hasSuffix "DualStack" .ipFamilyPolicy)) -}}
{{- fail "service.ipFamilies names two, for which service.ipFamilyPolicy must be PreferDualStack or RequireDualStack" -}}
{{- end -}}
{{- if and (has "IPv6" .ipFamilies) (ne $.Values.server.host "::") -}}
{{- fail (printf "service.ipFamilies has IPv6 and server.host %s listens on IPv4 alone; set server.host to \"::\"" $.Values.server.host) -}}
{{- end -}}
{{- $names := list "http" -}}
{{- $ports := list (printf "port %d/TCP" (int .port)) (printf "nodePort %d/TCP" (default 0 .nodePort | int)) -}}
{{- range .extraPorts -}}
{{- $port := printf "port %d/%s" (int .port) (default "TCP" .protocol) -}}
{{- $nodePort := printf "nodePort %d/%s" (default 0 .nodePort | int) (default "TCP" .protocol) -}}
{{- if or (has .name $names) (has $port $ports) (and .nodePort (has $nodePort $ports)) -}}
{{- fail (printf "service.extraPorts: %s (%s) is there already; each port of a Service has a name and numbers of its own" .name $port) -}}
{{- end -}}
{{- if and .nodePort (eq $.Values.service.type "ClusterIP") -}}
{{- fail (printf "service.extraPorts: %s has a nodePort and service.type ClusterIP has none; set NodePort or LoadBalancer" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- $ports = concat $ports (list $port $nodePort) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkTls" -}}
{{- with .Values.tls.ca -}}
{{- if and .existingSecret .existingConfigMap -}}
{{- fail "tls.ca.existingSecret and tls.ca.existingConfigMap are both set; give one of them" -}}
{{- end -}}
{{- if and (or .existingSecret .existingConfigMap) (not $.Values.tls.existingSecret) -}}
{{- fail "tls.ca is set and tls.existingSecret is not: the server speaks HTTP, and nothing would be checked; set tls.existingSecret" -}}
{{- end -}}
{{- if and $.Values.tls.existingSecret $.Values.monitoring.serviceMonitor.enabled (not (or .existingSecret .existingConfigMap $.Values.monitoring.serviceMonitor.tlsConfig)) -}}
{{- fail "monitoring.serviceMonitor with tls.existingSecret: no public CA signs a name in .svc, so every scrape would fail; give tls.ca, or monitoring.serviceMonitor.tlsConfig, for example {insecureSkipVerify: true}" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.checkLoadtest" -}}
{{- with .Values.loadtest -}}
{{- if .enabled -}}
{{- if not .startAt -}}
{{- fail "loadtest.enabled needs loadtest.startAt: the moment at which all parts start, in UTC, 2 or 3 minutes ahead, for example 2026-11-28T13:00:00Z" -}}
{{- end -}}
{{- if not .existingClaim -}}
{{- fail "loadtest.enabled needs loadtest.existingClaim: the claim that the parts write their results to" -}}
{{- end -}}
{{- if .resources.claims -}}
{{- fail "loadtest.resources has claims, and a load test uses no device; leave them out" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
