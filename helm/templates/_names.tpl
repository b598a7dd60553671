{{/* A DNS label of at most 40 characters: a StatefulSet's pods, revisions and Jobs put up to 22 more behind it in labels.
What had to be changed or cut ends with a hash of itself, so that two different names stay different. */}}
{{- define "lowbit.dnsLabel" -}}
{{- $label := regexReplaceAll "[^a-z0-9-]" (lower .) "-" -}}
{{- if not (regexMatch "^[a-z]" $label) }}{{ $label = printf "lowbit-%s" (trimPrefix "-" $label) }}{{ end -}}
{{- if or (ne $label .) (gt (len $label) 40) -}}
{{- printf "%s-%s" ($label | trunc 31 | trimSuffix "-") (sha256sum . | trunc 8) -}}
{{- else -}}
{{- $label -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.name" -}}
{{- include "lowbit.dnsLabel" (default .Chart.Name .Values.nameOverride) -}}
{{- end -}}

{{/* RELEASE-lowbit; a release that begins with the chart's name, or with no letter, stands for itself. */}}
{{- define "lowbit.fullname" -}}
{{- $name := include "lowbit.name" . -}}
{{- $release := .Release.Name -}}
{{- if .Values.fullnameOverride -}}
{{- include "lowbit.dnsLabel" .Values.fullnameOverride -}}
{{- else if or (eq $release $name) (hasPrefix (printf "%s-" $name) $release) (not (regexMatch "^[a-z]" $release)) -}}
{{- include "lowbit.dnsLabel" $release -}}
{{- else -}}
{{- include "lowbit.dnsLabel" (printf "%s-%s" $release $name) -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.namespace" -}}
{{- default .Release.Namespace .Values.namespaceOverride -}}
{{- end -}}

{{/* Name of the Service as every client in the cluster finds it. */}}
{{- define "lowbit.serviceHost" -}}
{{- printf "%s.%s.svc" (include "lowbit.fullname" .) (include "lowbit.namespace" .) -}}
{{- end -}}

{{- define "lowbit.url" -}}
{{- printf "%s://%s:%d" (lower (include "lowbit.scheme" .)) (include "lowbit.serviceHost" .) (int .Values.service.port) -}}
{{- end -}}

{{/* (list $ COMPONENT): what selectors need. A component tells server, follower, quantize, test and loadtest apart;
without one it is all that the release's pods have in common. */}}
{{- define "lowbit.selectorLabels" -}}
{{- $ := first . -}}
app.kubernetes.io/name: {{ include "lowbit.name" $ | quote }}
app.kubernetes.io/instance: {{ $.Release.Name | quote }}
{{- with index . 1 }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{/* (list $ COMPONENT MORE): MORE is a map of values, which never replaces one of the chart's. */}}
{{- define "lowbit.labels" -}}
{{- $ := first . -}}
{{- $own := include "lowbit.selectorLabels" . | fromYaml -}}
{{- $_ := set $own "app.kubernetes.io/version" $.Chart.AppVersion -}}
{{- $_ := set $own "app.kubernetes.io/managed-by" $.Release.Service -}}
{{- $_ := set $own "helm.sh/chart" (regexReplaceAll "^[^A-Za-z0-9]+|[^A-Za-z0-9]+$" (printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_" | trunc 63) "") -}}
{{- range $label := keys (index . 2) -}}
{{- if hasKey $own $label -}}
{{- fail (printf "a label of the values is %s, which the chart sets and selectors need; choose another key" $label) -}}
{{- end -}}
{{- end -}}
{{- merge $own (index . 2) | toYaml -}}
{{- end -}}

{{/* (list $ SUFFIX COMPONENT MORE): name, namespace and labels of a resource. */}}
{{- define "lowbit.metadata" -}}
{{- $ := first . -}}
name: {{ printf "%s%s" (include "lowbit.fullname" $) (index . 1) | quote }}
namespace: {{ include "lowbit.namespace" $ | quote }}
labels:
  {{- include "lowbit.labels" (list $ (index . 2) (index . 3)) | nindent 2 }}
{{- end -}}

{{- define "lowbit.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "lowbit.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* A parent chart's global.imageRegistry takes the place of the registry in image.repository. */}}
{{- define "lowbit.image" -}}
{{- $repository := .Values.image.repository -}}
{{- with (.Values.global).imageRegistry -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .) (regexReplaceAll "^([^/]*[.:][^/]*|localhost)/" $repository "") -}}
{{- end -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default (printf "%s-%s" .Chart.AppVersion (include "lowbit.device" .)) .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The device that an image of the Dockerfile is built for. */}}
{{- define "lowbit.device" -}}
{{- if eq (int .Values.gpu.count) 0 -}}cpu
{{- else if hasPrefix "amd.com/" .Values.gpu.resourceName -}}rocm
{{- else -}}gpu
{{- end -}}
{{- end -}}

{{- define "lowbit.scheme" -}}
{{- ternary "HTTPS" "HTTP" (ne .Values.tls.existingSecret "") -}}
{{- end -}}

{{/* Empty where everybody is let in. */}}
{{- define "lowbit.keysSecret" -}}
{{- if .Values.apiKeys.entries -}}
{{- printf "%s-api-keys" (include "lowbit.fullname" .) -}}
{{- else -}}
{{- .Values.apiKeys.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.startupBudgetS" -}}
{{- if kindIs "invalid" .Values.startup.budgetS -}}
{{- add 300 (mul 30 (int .Values.checkpoint.sizeGib)) -}}
{{- else -}}
{{- int .Values.startup.budgetS -}}
{{- end -}}
{{- end -}}

{{/* Not empty where one model spans several nodes. */}}
{{- define "lowbit.multiNode" -}}
{{- if gt (int .Values.parallel.nodes) 1 }}true{{ end -}}
{{- end -}}

{{/* What is scaled. A LeaderWorkerSet makes a headless Service of its own name, which must not be ours. */}}
{{- define "lowbit.workload" -}}
{{ include "lowbit.fullname" . }}{{ if include "lowbit.multiNode" . }}-nodes{{ end }}
{{- end -}}

{{- define "lowbit.scaleTarget" -}}
{{- if include "lowbit.multiNode" . -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: Deployment
{{- end }}
name: {{ include "lowbit.workload" . | quote }}
{{- end -}}

{{/* Selector of leaders and followers. */}}
{{- define "lowbit.everyNode" -}}
matchLabels:
  {{- include "lowbit.selectorLabels" (list . "") | nindent 2 }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [server, follower]}
{{- end -}}

{{- define "lowbit.tensorSize" -}}
{{- if kindIs "invalid" .Values.parallel.tensorSize }}{{ max 1 (int .Values.gpu.count) }}{{ else }}{{ int .Values.parallel.tensorSize }}{{ end -}}
{{- end -}}

{{- define "lowbit.pipelineSize" -}}
{{- if kindIs "invalid" .Values.parallel.pipelineSize }}{{ int .Values.parallel.nodes }}{{ else }}{{ int .Values.parallel.pipelineSize }}{{ end -}}
{{- end -}}
